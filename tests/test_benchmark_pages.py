"""The page of comparisons: sections, the table at its top, and `make bench`, which goes on where it was stopped."""

import json

import measure
import run_all
import summary


ROWS = [
    measure.row("a step: time of the peer over ours", 10.0, 12.0, (1.1, 1.2, 1.3), 1.25, unit="ms"),
    measure.row("memory: ours over the peer's", 90.0, 100.0, 0.9, 0.95, more=False, unit="MiB"),
    measure.row("odd values", 0, None, None, 0, more=False),
    measure.row("without a goal", 1.0, 1500.0, [11.0, 12.34, 13.0]),
]


def test_goals_are_judged_by_the_median():
    judged = [measure.judge(entry) for entry in ROWS]
    assert judged == [
        (1.2, "at least 1.25", "**not reached**"),
        (0.9, "at most 0.95", "reached"),
        (0, "at most 0", "reached"),
        (12.34, "", ""),
    ]
    table = measure.verdicts(ROWS)
    assert "without a goal" not in table and "| 1.20 | **not reached** |" in table


def test_the_table_follows_what_each_script_found(tmp_path, capsys):
    page = tmp_path / "benchmarks.md"
    page.write_text(
        "# Title\n\n<!-- summary -->\n<!-- end of summary -->\n\nWords.\n\n<!-- b c -->\n<!-- end of b c -->\n"
    )
    summary.publish(page, "a", "text of a", ROWS[:1], where="machine 1")
    summary.publish(page, "b c", "text of b", ROWS[1:], where="machine 1")
    text = page.read_text()
    top = text[: text.index("Words.")]
    # b's section stands before a's, which was added at the end.
    assert top.index("odd values") < top.index("a step") and top.count("machine 1") == 1
    assert "| a step: time of the peer over ours | 10 ms | 12 ms | 1.20 (1.10 to 1.30) | at least 1.25 |" in top
    assert "| 1,500 | 12.3 (11.0 to 13.0) |" in top and "text of a" in text and "Words." in text
    summary.publish(page, "a", "text again", [measure.row("a step", 1.0, 3.0, 3.0)], where="machine 2")
    text = page.read_text()
    assert "text of a" not in text and "1.20 (1.10" not in text and text.count("| comparison |") == 2
    before = page.read_text()
    assert summary.main(["--out", str(page)]) in before and page.read_text() == before
    assert not list(tmp_path.glob("*.part"))
    assert "text again" in capsys.readouterr().out


def test_numbers_are_short():
    assert [summary.number(v, "s") for v in (0.01234, 12.345, 1234.5, None)] == ["0.0123 s", "12.3 s", "1,234 s", ""]


def test_all_scripts_are_there_and_named_once():
    for name, command in run_all.SCRIPTS.items():
        script = run_all.HERE / command.split()[0]
        assert script.is_file(), name
        assert "publish(" in script.read_text()


def test_make_bench_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    page, state, ran, broken = tmp_path / "benchmarks.md", tmp_path / "state" / "done.txt", [], {"b"}
    monkeypatch.setattr(run_all, "SCRIPTS", {"a": "a.py", "b": "b.py", "c": "c.py"})
    monkeypatch.setattr(run_all, "run", lambda name, where: ran.append(name) or name not in broken)
    (tmp_path / "benchmarks").mkdir()
    for name, seconds in (("a", 120), ("c", None)):
        (tmp_path / "benchmarks" / f"{name}.json").write_text(json.dumps({"seconds": seconds}))
    words = ["--out", str(page), "--state", str(state)]
    assert run_all.main(words) == 1 and ran == ["a", "b", "c"]
    shown = capsys.readouterr()
    assert "3 of 3 comparisons to go; about 2 minutes, as recorded; not recorded yet: b, c\n" in shown.out
    assert shown.err == "failed: b; the same command tries them again\n" and state.read_text() == "a\nc\n"
    broken.clear()
    assert run_all.main(words) == 0 and ran[3:] == ["b"] and not state.exists()
    assert run_all.main(words) == 0 and ran[4:] == ["a", "b", "c"]
    state.write_text("a\nb\n")
    assert run_all.main([*words, "--again"]) == 0 and ran[7:] == ["a", "b", "c"]
