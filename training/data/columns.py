"""Which column of a data set is the image, the label and the mask. One rule for all commands:

- image: `data.image_column`; else the first column of images; else the first of bytes that has one of `IMAGE_NAMES`.
- label: `data.label_column`; else the first of `LABEL_NAMES`, in this order, that holds classes (numbers, text or truth
  values; that the numbers are whole is seen when they are read); else the first column of class labels.
- mask: `data.mask_column`; else the first of `MASK_NAMES`, in this order, that holds images, arrays, lists or bytes;
  else the first column of images after that of the image.
"""

import datasets

from hf_mim.modeling.options import unknown_choice
from hf_mim.training.common.errors import DataError
from hf_mim.training.data.arguments import DataArguments


IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "tif", "tiff", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target", "category")
MASK_NAMES = ("mask", "masks", "annotation", "annotations", "segmentation_mask", "segmentation", "label", "labels")
BYTES = ("binary", "large_binary")
LISTS = "lists of images"


def find_columns(features: dict, data: DataArguments) -> tuple[str, str | None]:
    """The names of the image column and of the label column, or None for the latter.

    Raises:
        ValueError: a named column does not exist, or no column holds images.
    """
    _check_names(features, data, "image_column", "label_column")
    image = data.image_column or next((n for n, f in features.items() if isinstance(f, datasets.Image)), None)
    image = image or next((n for n in features if n.lower() in IMAGE_NAMES and _holds_files(features[n])), None)
    image = image or next((n for n, f in features.items() if _kind_of(f) == LISTS), None)  # refused below
    if image is not None and not (isinstance(features[image], datasets.Image) or _can_be_image(features[image])):
        raise DataError(
            f"the column {image!r} holds {_kind_of(features[image])}; one image a row is needed. Write one row for "
            "each image, or name another column in data.image_column",
            image,
        )
    if image is None:
        raise DataError(
            f"no column holds images; the columns are {', '.join(features)}. If one does, name it in data.image_column"
        )
    label = data.label_column or next((n for n in LABEL_NAMES if is_class(features.get(n))), None)
    return image, label or next((n for n, f in features.items() if isinstance(f, datasets.ClassLabel)), None)


def find_label_column(features: dict, data: DataArguments) -> str:
    """The name of the column with the classes, for commands that cannot do without.

    Raises:
        ValueError: there is none, or the named one does not hold classes.
    """
    _, column = find_columns(features, data)
    name = column or next((name for name in LABEL_NAMES if name in features), None)
    if name is None:
        raise DataError(
            f"fine-tuning needs labels, and the columns are only {', '.join(features)}: name one in data.label_column; "
            "a folder of images has labels if it holds one folder for each of at least two classes"
        )
    if not is_class(features[name]):
        feature = features[name]
        kind = f"{feature.dtype} values" if isinstance(feature, datasets.Value) else "several values an image"
        raise DataError(
            f"the column {name!r} holds {kind}, and fine-tuning learns classes: one whole number or text an image"
        )
    return name


def find_mask_columns(features: dict, data: DataArguments) -> tuple[str, str]:
    """The names of the image column and of the mask column.

    Raises:
        ValueError: a named column does not exist, or none holds images or masks.
    """
    _check_names(features, data, "mask_column")
    named = [n for name in MASK_NAMES for n in features if n.lower() == name and _is_map(features[n])]
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    others = [name for name in images if name != data.image_column][1 if data.image_column is None else 0 :]
    mask = data.mask_column or next(iter([*named, *others]), None)
    if mask is None:
        raise DataError(
            f"no column holds masks; the columns are {', '.join(features)}. If one does, name it in data.mask_column"
        )
    return find_columns({name: f for name, f in features.items() if name != mask}, data)[0], mask


def is_class(feature) -> bool:
    """Whether a column can hold the labels of whole images: no lists and no bytes. Of floats it is only seen when they
    are read whether they are whole."""
    dtype = str(feature.dtype) if isinstance(feature, datasets.Value) else ""
    simple = ("string", "large_string", "bool", "null")
    return isinstance(feature, datasets.ClassLabel) or dtype in simple or "int" in dtype or "float" in dtype


def _check_names(features: dict, data: DataArguments, *keys: str) -> None:
    for key in keys:
        name = getattr(data, key)
        if name is not None and name not in features:
            raise unknown_choice(f"data.{key}", name, features)


def _holds_bytes(feature) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in BYTES


def _holds_files(feature) -> bool:
    return "bytes" in feature if isinstance(feature, dict) else _holds_bytes(feature)


def _can_be_image(feature) -> bool:
    return _holds_files(feature) or isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _kind_of(feature) -> str:
    if isinstance(feature, datasets.Value):
        return f"{feature.dtype} values"
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Image) or inner is not None and _holds_files(inner):
        return LISTS
    return "lists of values" if inner is not None else f"{type(feature).__name__}"


def _is_map(feature) -> bool:
    kinds = (datasets.Image, datasets.Array2D, datasets.Array3D, datasets.List, datasets.LargeList)
    return isinstance(feature, kinds) or _holds_bytes(feature)
