"""Photos as people keep them, read as upright 8-bit sRGB, with the captions beside them."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from mep_lightning.errors import UserError
from mep_lightning.reading import read_text

Crop = Literal["center", "letterbox"]

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp")
# Pictures that people have in such folders and that are not read: a warning names them.
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".tif", ".tiff", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".psd", ".svg")
# Decoders are chosen by content, whatever the suffix says; Pillow's others (EPS runs Ghostscript) are not needed here.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MIN_SIDE = 32

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Photo:
    """One photo: decoded when asked for, so that a folder of any length costs the memory of one picture."""

    name: str
    source: Path | Image.Image
    caption: str | None = None

    def read(self, at_least: int | None = None) -> Image.Image:
        """The whole picture, upright RGB; see `read_photo`."""
        return to_rgb(self.source) if isinstance(self.source, Image.Image) else read_photo(self.source, at_least)


def find_photos(path: str | Path) -> list[Photo]:
    """List the photos of a folder by name with their captions; hidden files, subfolders and other files are left out.

    Args:
        path: a folder, or a single photo.

    Raises:
        UserError: nothing there, no photo in it, or captions that cannot be read.
    """
    path = Path(path).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path} is no JPEG, PNG or WebP: give data.path a photo or a folder of photos")
        captions = read_captions(path.parent, _names(path.parent, SUFFIXES))
        return [Photo(path.name, path, captions.get(path.name))]
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give data.path a folder of JPEG, PNG or WebP photos")

    names, unread = _names(path, SUFFIXES), _names(path, UNREAD_SUFFIXES)
    if not names:
        raise UserError(f"{path} has no JPEG, PNG or WebP photo in it: {_where_else(path, unread)}")
    if unread:
        rest = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        warnings.warn(f"{path / unread[0]}{rest} left out: convert to JPEG or PNG to use it", stacklevel=2)
    captions = read_captions(path, names)
    return [Photo(name, path / name, captions.get(name)) for name in names]


def holds_photos(folder: Path) -> bool:
    """Whether there is such a folder, and a photo in it."""
    return folder.is_dir() and bool(_names(folder, SUFFIXES))


def _names(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """Visible files with one of the suffixes, in any case, sorted the same way on every system."""
    files = (f for f in _listing(folder) if f.suffix.lower() in suffixes and not f.name.startswith("."))
    return sorted(f.name for f in files if f.is_file())


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder} cannot be opened ({error.strerror}): check its permissions") from error


def _where_else(folder: Path, unread: list[str]) -> str:
    if unread:
        return f"convert its {Path(unread[0]).suffix.lower()} files to JPEG or PNG"
    for sub in sorted(f for f in _listing(folder) if f.is_dir() and not f.name.startswith(".")):
        if _names(sub, SUFFIXES):
            return f"give data.path the folder of one subject, such as {sub}"
    return "put 3 to 10 photos of the subject there or give data.path another folder"


def read_photo(path: Path, at_least: int | None = None) -> Image.Image:
    """Decode one photo (the first frame of an animation) as upright RGB, transparency over white.

    Args:
        path: the file.
        at_least: lets the JPEG decoder skip detail by a power of two while both sides keep this many pixels.

    Raises:
        UserError: empty, truncated, no picture, beyond Pillow's pixel limit, or a side under 32 px.
    """
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty (0 bytes): copy it here again or remove it")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's half-limit warning, odd EXIF: not the user's concern
            with Image.open(path, formats=FORMATS) as image:
                if min(image.size) < MIN_SIDE:
                    raise UserError(
                        f"{path} is {image.width}x{image.height} px: use photos of {MIN_SIDE} px or more a side"
                    )
                if at_least is not None:
                    image.draft(None, (at_least, at_least))
                image.load()
                return to_rgb(image)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UserError(f"{path} has more than {limit} million pixels: scale it down or remove it") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        reason = "not a JPEG, PNG or WebP inside" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise UserError(f"{path} cannot be read ({reason}): save it again as JPEG or PNG, or remove it") from error


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as upright 8-bit sRGB: EXIF orientation, 16-bit grey, alpha over white, CMYK, colour profile."""
    upright, profile = _orientation(image), image.info.get("icc_profile")
    if image.mode.startswith("I"):  # Pillow's own conversion clips or drops bits, depending on its version
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    image = _to_srgb(image, profile) if profile else image.convert("RGB")
    return image.transpose(upright) if upright is not None else image


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged EXIF in a sound picture: show it as stored
        return None


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Colours as the profile means them (phones write Display P3); a broken or unfitting profile is passed over."""
    try:
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, ImportError):
        return image.convert("RGB")
    return converted or image.convert("RGB")


def square(image: Image.Image, size: int, crop: Crop = "center") -> Image.Image:
    """The picture as size x size px (Lanczos): its central square, or all of it between white bars."""
    if crop == "letterbox":
        return ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color="white")
    image = central_square(image)
    return image if image.width == size else image.resize((size, size), Image.Resampling.LANCZOS)


def central_square(image: Image.Image) -> Image.Image:
    """What training sees of a picture, at its own size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def read_captions(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Captions by photo name: NAME.txt beside the photo, or metadata.jsonl with "file_name" and "text" on each line.

    NAME.txt wins where both speak; a caption of nothing but white space counts as none, and one of a picture that is
    not read (HEIC, TIFF) is passed over.

    Raises:
        UserError: a line that is no such object or names no photo of the folder, or a file that is not UTF-8.
    """
    captions = {}
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        unread = _names(folder, UNREAD_SUFFIXES)
        for number, line in enumerate(_read_text(metadata).split("\n"), start=1):
            if line.strip():
                name, text = _metadata_entry(line, f"{metadata} line {number}")
                if name in unread:
                    continue
                if name not in names:
                    raise UserError(
                        f'{metadata} line {number} names "{name}", no photo of that folder: correct the name'
                    )
                captions[name] = text
    for name in names:
        beside = (folder / name).with_suffix(".txt")
        if beside.is_file():
            captions[name] = _read_text(beside)
    return {name: text for name, text in captions.items() if text.strip()}


def _metadata_entry(line: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:  # digits without end are a ValueError
        why = error.msg if isinstance(error, json.JSONDecodeError) else "too deep or too long"
        raise UserError(f'{where} is no JSON ({why}): write {{"file_name": "1.jpg", "text": "…"}}') from error
    for key in ("file_name", "text"):
        if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
            raise UserError(f'{where} lacks "{key}": write {{"file_name": "1.jpg", "text": "…"}}')
    if any("\ud800" <= letter <= "\udfff" for letter in entry["text"]):
        raise UserError(f"{where} holds half of a character (\\ud800 to \\udfff): write it whole")
    return entry["file_name"], entry["text"]


def _read_text(path: Path) -> str:
    try:
        return read_text(path, encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: save it as UTF-8 or remove it") from error
