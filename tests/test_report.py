"""The page of an analysis (hf_mim/analysis/report.py), also as a real browser shows it."""

import html
import html.parser
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import PIL.Image
import pytest
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from hf_mim.analysis import figures
from hf_mim.analysis.report import by_twin, headline_cell, write_report


HOSTILE = "<img src=x onerror=alert(1)>\"'&$x_{\\frac"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def curve(seed: int, blocks: int, banded: bool = True, scale: float = 1.0) -> dict:
    mean = scale * np.random.default_rng(seed).random(blocks)
    edges = {"low": (0.9 * mean).tolist(), "high": (1.1 * mean).tolist()} if banded else {"low": None, "high": None}
    axes = {"x_label": "block", "y_label": "mass of attention", "unit": "share", "title": "[cls] to itself"}
    return {"x": list(range(1, blocks + 1)), "mean": mean.tolist(), **edges, **axes}


def encoder(seed: int, twin: str | None, blocks: int = 4) -> dict:
    scalar = {"title": "token accuracy, as it is", "value": 0.5, "low": 0.4, "high": 0.6, "unit": "share", "normal": ""}
    attention = {
        "title": "Attention flow",
        "summary": f"Encoder {seed} looks at itself.",
        "normal": "Little is normal.",
        "images": 1234,
        "curves": {"cls_cls": curve(seed, blocks), "largest": curve(seed, blocks, False, 1e4)},
        "maps": {"mean": {"title": "where [cls] looks", "images": [[[[0.0, 1.0], [2.0, 3.0]]] * blocks] * 2}},
    }
    cka = {"title": "CKA", "summary": "Alike.", "normal": "", "images": 1234}
    square = np.random.default_rng(seed).random((blocks, blocks)).tolist()
    axes = {"x": list(range(blocks)), "y": list(range(blocks)), "x_label": "block", "y_label": "block"}
    return {
        "source": None if twin is None else "here",
        "untrained": twin is None,
        "twin": twin,
        "encoder": "vit",
        "parameters": 1_234_567,
        "image_size": [28, 28],
        "grid": [7, 7],
        "results": {
            "attention_flow": attention,
            "consistency": {
                **{**cka, "title": "Consistency"},
                "scalars": {"token_accuracy_plain": scalar, "other": {**scalar, "title": "token accuracy, merged"}},
            },
            "cka": {**cka, "heatmaps": {"layers": {"title": "between the blocks", "values": square, **axes}}},
            "fourier": {"title": "Fourier", "absent": f"No {HOSTILE} here."},
        },
    }


def results_of(labels: list[str]) -> dict:
    encoders = {label: encoder(i, f"untrained {label}") for i, label in enumerate(labels)}
    encoders |= {f"untrained {label}": encoder(10 + i, None) for i, label in enumerate(labels)}
    return {
        "command": f"hf-mim analyze {' '.join(labels)}",
        "date": "2026-01-01 12:00:00",
        "versions": {"torch": "2.15"},
        "seed": 0,
        "seconds": 12.3,
        "data": {"dataset": HOSTILE, "from": "split test", "images": 1234, "prototype_images": 9, "classes": [HOSTILE]},
        "examples": ["example-0.png", "example-1.png"],
        "encoders": encoders,
        "between": {},
    }


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page about an encoder with a hostile name and one with a long name, and what it was made of."""
    folder, results = tmp_path_factory.mktemp("report"), results_of([HOSTILE, "a-rather-long-name-of-a-checkpoint" * 2])
    for name in results["examples"]:
        PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / name)
    return write_report(folder, results), results


class Addresses(html.parser.HTMLParser):
    """Everything that a page would fetch or lead to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]


def test_the_page_stands_alone_and_says_everything(report):
    path, results = report
    page = path.read_text()
    addresses = Addresses()
    addresses.feed(page)
    assert len(addresses.found) > 10 and all(address.startswith(("data:", "#")) for address in addresses.found)
    assert not re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    for words in ("1,234", "Little is normal.", "Encoder 0 looks", "2026-01-01", "torch 2.15", "50.0 %"):
        assert words in page
    assert html.unescape(re.search(r'<pre id="command">(.*?)</pre>', page, re.DOTALL)[1]) == results["command"]
    assert html.escape(HOSTILE)[:12] in page and HOSTILE not in page and "<img src=x" not in page
    assert "prefers-color-scheme: dark" in page and "default-src 'none'" in page


def test_every_picture_has_an_alternative_text(report):
    page = report[0].read_text()
    drawings = re.findall(r"<svg[^>]*>", page)
    assert page.count("<title>") > 20  # of points, for the pointer
    assert len(drawings) > 10 and all('aria-label="' in tag or 'aria-hidden="true"' in tag for tag in drawings)
    assert all(' alt="' in tag for tag in re.findall(r"<img[^>]*>", page))
    assert "from " in re.search(r'aria-label="(Line chart[^"]*)"', page)[1]


def test_pngs_lie_beside_the_page(report):
    path, _ = report
    for name in ("attention_flow.png", "cka.png"):
        assert min(PIL.Image.open(path.parent / name).size) > 300
    assert {entry.suffix for entry in path.parent.iterdir()} == {".html", ".png"}


def test_a_line_lies_where_its_numbers_say():
    data = {**curve(0, 3), "mean": [0.0, 0.5, 1.0], "low": None, "high": None}
    style = figures.Style(0, "o", True)
    drawn = drawing({"a": data}, {"a": style})
    (d,) = re.findall(r'<path d="(M[^"]*)" style="[^"]*stroke-dasharray[^"]*stroke: var\(--c0\)', drawn)  # untrained
    xs, ys = np.array(re.findall(r"([\d.]+) ([\d.]+)", d), dtype=float).T
    assert len(xs) == 3 and np.ptp(np.diff(xs)) < 1e-3 and np.ptp(np.diff(ys)) < 1e-3 and (np.diff(ys) < 0).all()
    lines = [
        float(y) for y in re.findall(r'<path d="M [\d.]+ ([\d.]+) *\n?L [\d.]+ \1 *\n?" style="[^"]*--grid', drawn)
    ]
    shown = [float(words) for words in re.findall(r">([\d.]+) %<", drawn)]
    assert len(lines) == len(shown) > 2
    per_percent = (lines[-1] - lines[0]) / (shown[-1] - shown[0])
    np.testing.assert_allclose(ys, [lines[0] + per_percent * (v - shown[0]) for v in (0, 50, 100)], atol=0.1)
    assert "a, block 2: 50.0 %" in drawn


def drawing(curves: dict, styles: dict) -> str:
    return str(figures.to_svg(figures.line_chart("t", curves, styles)))


def test_numbers_that_are_missing_constant_or_far_apart_can_be_drawn():
    style = {"a": figures.Style(0, "o", False)}
    for values in ([None, 1.0, None], [None] * 3, [0.0, 0.0, 0.0], [2.5, 2.5, 2.5], [1e-6, 1.0, 1e6], [-3.0, 0.0, 5.0]):
        drawn = drawing({"a": {**curve(0, 3, False), "mean": values}}, style)
        assert "nan" not in drawn and "inf" not in drawn
        assert drawn.count("<title>") == sum(value is not None for value in values)
    assert "logarithmic" in drawing({"a": {**curve(0, 2, False), "mean": [1e-6, 1.0]}}, style)


@pytest.mark.parametrize("blocks", [1, 2, 4, 13, 48])
def test_blocks_are_whole_numbers(blocks):
    drawn = drawing({"a": {**curve(0, blocks), "unit": ""}}, {"a": figures.Style(0, "o", False)})
    below = [words for words in re.findall(r"text-anchor: middle[^>]*>([^<]*)<", drawn) if words != "block"]
    assert all(re.fullmatch(r"\d+", words) for words in below) and 1 <= len(below) <= 8


def test_bars_do_not_cover_labels_and_labels_say_what_the_bars_are():
    scalar = {"value": 0.5, "low": 0.4, "high": 0.6, "unit": "share", "normal": ""}
    rows = {name: dict.fromkeys("abc", scalar) for name in ("first, x", "first, y", "other")}
    styles = {label: figures.Style(i, "o", False) for i, label in enumerate("abc")}
    drawn = str(figures.to_svg(figures.interval_chart("t", rows, styles, "share")))
    bars = [float(y) for y in re.findall(r'<path d="M [\d.]+ ([\d.]+) *\n?L [\d.]+ \1 *\n?" style="[^"]*--c\d', drawn)]
    baselines = [float(y) for y in re.findall(r"text-anchor: start[^>]*translate\([\d.]+ ([\d.]+)\)", drawn)]
    baselines += [
        float(y) for y in re.findall(r'<text style="[^"]*" x="[\d.]+" y="([\d.]+)"[^>]*>(?:first|x|y|other)<', drawn)
    ]
    assert len(bars) == 9 and len(baselines) == 4
    # From the tops of the letters to below them, a bar being 2 and its marker 5 points high.
    assert all(not y - 11 - 2.5 < bar < y + 3 + 2.5 for y in baselines for bar in bars)


def test_a_twin_has_the_colour_of_its_encoder_and_is_dashed():
    encoders = {
        "a": {"untrained": False, "twin": "u"},
        "b": {"untrained": False, "twin": "u"},
        "c": {"untrained": False, "twin": "v"},
        "v": {"untrained": True, "twin": None},
        "u": {"untrained": True, "twin": None},
    }
    styles = figures.styles_of(encoders)
    assert [styles[label].colour for label in "abcuv"] == [0, 1, 2, 0, 2]
    assert [styles[label].untrained for label in "abcuv"] == [False] * 3 + [True] * 2
    assert by_twin(encoders) == ["a", "b", "u", "c", "v"]
    many = {str(i): {"untrained": False, "twin": None} for i in range(20)}
    looks = [(style.colour, style.marker) for style in figures.styles_of(many).values()]
    assert len(set(looks)) == 20


def luminance(colour: str) -> float:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize(("which", "card"), [(0, "#ffffff"), (1, "#1d2024")])
def test_colours_stand_out_from_the_page(which, card):
    for pair in figures.PALETTE:
        dark, light = sorted((luminance(pair[which]), luminance(card)))
        assert (light + 0.05) / (dark + 0.05) >= 3, pair[which]  # WCAG 2.1, 1.4.11


# Machado et al. 2009, severity 1: how linear RGB looks without the cones for red, green or blue.
BLINDNESS = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("matrix", BLINDNESS.values(), ids=BLINDNESS)
def test_colours_are_told_apart_with_any_colour_vision(which, matrix):
    from skimage.color import deltaE_ciede2000, xyz2lab
    from skimage.color.colorconv import xyz_from_rgb

    colours = [[int(pair[which][i : i + 2], 16) / 255 for i in (1, 3, 5)] for pair in figures.PALETTE]
    linear = np.where(
        np.array(colours) <= 0.04045, np.array(colours) / 12.92, ((np.array(colours) + 0.055) / 1.055) ** 2.4
    )
    seen = xyz2lab(np.clip(linear @ np.transpose(matrix), 0, 1) @ xyz_from_rgb.T)
    for one, other in itertools.combinations(range(len(seen)), 2):
        assert deltaE_ciede2000(seen[one], seen[other]) > 9, (figures.PALETTE[one], figures.PALETTE[other])


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, ("–", None)),
        ({"value": 0.1234, "low": 0.1, "high": 0.2, "unit": "share"}, ("12.3 %", "7.7")),
        ({"value": 0.002, "low": None, "high": None, "unit": "share"}, ("0.2 %", None)),
        ({"value": 29.71, "low": None, "high": None, "unit": "dimensions"}, ("29.7", None)),
        ({"value": 0.0, "low": 0.0, "high": 0.0, "unit": "nats"}, ("0", "0")),
        # As many decimals behind ± as before it.
        ({"value": 0.0085, "low": 0.0059, "high": 0.01, "unit": "share"}, ("0.85 %", "0.26")),
        ({"value": -4.93, "low": -5.056, "high": -4.85, "unit": "nats"}, ("-4.93", "0.13")),
        ({"value": 0.5, "low": 0.4999, "high": 0.5, "unit": "share"}, ("50.0 %", "0.1")),
        ({"value": 1234.5, "low": 1200.0, "high": 1250.0, "unit": ""}, ("1,234", "34")),
    ],
)
def test_the_first_table_says_numbers_as_people_do(found, words):
    assert headline_cell(found) == words


# ---- in a browser --------------------------------------------------------------------------------------------------
WIDTHS = (360, 1280)
PROBE = """
addEventListener("load", async () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, root = page.documentElement, view = frame.contentWindow;
    const button = page.querySelector("[data-copy]");
    button.click();
    await new Promise(done => setTimeout(done, 300));
    found[frame.width] = {
      client: root.clientWidth, scroll: root.scrollWidth, scripts: page.scripts.length, copied: button.textContent,
      requests: view.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
      page: view.getComputedStyle(page.body).backgroundColor, ink: view.getComputedStyle(page.body).color,
      line: view.getComputedStyle(page.querySelector('figure svg path[style*="--c0"]')).stroke,
      hints: [...page.querySelectorAll(".hint")].filter(h => !h.hidden && h.offsetParent).length,
      reachable: [...page.querySelectorAll(".scroll, .maps, .legend ul")].every(box => box.tabIndex === 0),
      table: view.words(page.getElementById("glance")), broken: [...page.images].filter(i => !i.naturalWidth).length,
    };
  }
  document.body.setAttribute("data-found", JSON.stringify(found));
});
"""


def browse(page: str, folder, *flags) -> tuple[dict, str]:
    """Opens a page in frames of `WIDTHS`, a window cannot be so narrow. -> what was found, and the browser's log."""
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
        for width in WIDTHS
    )
    (folder / "frames.html").write_text(f'<!doctype html><meta charset="utf-8"><body>{frames}<script>{PROBE}</script>')
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1800,1000", "--virtual-time-budget=4000", "--enable-logging=stderr", *flags]
    command += ["--dump-dom", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), done.stderr


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_shows_it_on_a_telephone_and_a_laptop_light_and_dark(report, tmp_path):
    path, results = report
    light, log = browse(path.read_text(), tmp_path, "--blink-settings=preferredColorScheme=1")
    assert "CONSOLE" not in log
    for found in light.values():
        assert found["scroll"] <= found["client"] and found["requests"] == [] and found["broken"] == 0
        assert found["reachable"]  # by keyboard, whose arrows then scroll
        assert found["scripts"] == 1  # the page's own: nothing of the hostile name became one
        assert found["copied"] in ("Copied", "Selected: press Ctrl+C")
    assert light["360"]["hints"] > 0
    rows = [row.split("\t") for row in light["1280"]["table"].split("\n")]
    assert len(rows) == 1 + len(results["encoders"]) and len({len(row) for row in rows}) == 1
    assert HOSTILE in rows[1][0]
    dark, log = browse(path.read_text(), tmp_path, "--blink-settings=preferredColorScheme=0")
    assert "CONSOLE" not in log
    for name in ("page", "ink", "line"):
        assert light["360"][name] != dark["360"][name]


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_the_browser_test_would_notice(report, tmp_path):
    wide = '<div style="width:2000px">x</div><script>console.log("said"); fetch("http://127.0.0.1:9/x")</script></main>'
    found, log = browse(report[0].read_text().replace("</main>", wide), tmp_path)
    assert all(entry["scroll"] > entry["client"] for entry in found.values()) and found["360"]["scripts"] == 2
    assert "said" in log and "Content Security Policy" in log


def test_no_text_of_a_figure_is_cut_however_long_the_names_are():
    names = ["pretrain-a2mim_convnext_small-2026-11-28-on-my-flowers", "w" * 90, "short"]
    styles = {name: figures.Style(i, "o", bool(i)) for i, name in enumerate(names)}
    curve = {"x": [0, 1, 2], "mean": [-0.000125, -0.000175, -0.00015], "low": None, "high": None, "unit": ""}
    curve |= {"x_label": f"block of {names[0]}", "y_label": f"what differs from the mean token of {names[0]}, a share"}
    heat = {"values": [[1.0, 0.5], [0.5, 1.0]], "x": [0, 1], "y": [0, 1], "title": "between the blocks"}
    heat |= {"x_label": f"block of {names[0]}", "y_label": f"block of untrained {names[1]}"}
    scalar = {"value": 0.7, "low": 0.6, "high": 0.8, "unit": ""}
    rows = {f"last blocks of {name} and untrained {names[0]}": {name: scalar} for name in names}
    drawings = {
        f"Of {names[0]}: between the blocks of this encoder": figures.heat_chart(heat),
        f"Norm of what differs from the mean token, over the norm of all, of {names[1]}": figures.line_chart(
            "norm", dict.fromkeys(names, curve), styles
        ),
        "Between encoders": figures.interval_chart("between", rows, styles, ""),
        "A title that is short": figures.heat_chart(heat),
    }
    with rc_context(figures.STYLE):
        sheet = figures.draw_sheet(drawings, styles)
        FigureCanvasAgg(sheet).draw()
        drawn, (width, height) = sheet.get_tightbbox(), sheet.get_size_inches()
        texts = [text for text in sheet.findobj(Text) if text.get_text()]
        boxes = [text.get_window_extent() for text in texts]
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height, drawn
    titles = [(text, box) for text, box in zip(texts, boxes) if text in sheet.texts]
    assert len(titles) == 4
    for title, box in titles:
        assert not [text for text, other in zip(texts, boxes) if text is not title and box.overlaps(other)], title
    assert all("…" not in text.get_text() for text in texts)
