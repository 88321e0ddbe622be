"""Photos come out upright, 8-bit sRGB, square; captions with a hole; bad files as a sentence that names them."""

import json
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from mep_lightning.errors import UserError
from mep_lightning.photos import Photo, find_photos, read_captions, read_photo, square, to_rgb
from mep_lightning.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES, caption_to_template, choose_templates, fill

UPRIGHT = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)

# How a camera stores the upright picture under each EXIF orientation: the inverse of what a viewer must do.
STORED = {
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT, 1),  # shown after a quarter turn clockwise
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),  # shown after a quarter turn anticlockwise
}


def image(array):
    return Image.fromarray(np.ascontiguousarray(array))


def blocks(*colors, size=(64, 64)):
    """Vertical stripes of equal width, so that JPEG keeps their middles."""
    return image(np.repeat(np.array([colors], dtype=np.uint8), size[0] // len(colors), axis=1).repeat(size[1], axis=0))


def refused(match, call, *args):
    with pytest.raises(UserError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- pixels


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_exif_orientation_is_undone_exactly(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image(STORED[orientation]).save(tmp_path / f"p.{suffix}", exif=exif, lossless=True)
    assert np.array_equal(np.asarray(read_photo(tmp_path / f"p.{suffix}")), UPRIGHT)


def test_exif_orientation_of_a_jpeg_that_is_decoded_small(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    blocks((255, 0, 0), (0, 0, 255), size=(1024, 512)).rotate(90, expand=True).save(tmp_path / "p.jpg", exif=exif)
    read = read_photo(tmp_path / "p.jpg", at_least=100)
    assert read.size == (256, 128)  # a quarter: an eighth would fall below 100
    assert np.allclose(read.getpixel((64, 64)), (255, 0, 0), atol=4)
    assert np.allclose(read.getpixel((192, 64)), (0, 0, 255), atol=4)


def test_decoding_small_matches_decoding_whole(tmp_path):
    ramp = np.linspace(0, 255, 800)
    photo = np.stack(np.broadcast_arrays(ramp[None], ramp[:600, None], 128), axis=-1).astype(np.uint8)
    image(photo).save(tmp_path / "p.jpg", quality=95)
    small, whole = read_photo(tmp_path / "p.jpg", at_least=128), read_photo(tmp_path / "p.jpg")
    assert small.size == (200, 150)
    assert whole.size == (800, 600)
    difference = np.subtract(square(small, 64), square(whole, 64), dtype=np.int16)
    assert np.abs(difference).max() <= 3


def test_damaged_exif_is_shown_as_stored(tmp_path):
    image(UPRIGHT).save(tmp_path / "p.png", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(np.asarray(read_photo(tmp_path / "p.png")), UPRIGHT)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_rgba_lies_on_white(tmp_path, suffix):
    rgba = np.zeros((32, 32, 4), dtype=np.uint8)
    rgba[..., 0] = 200
    rgba[:, :8, 3], rgba[:, 8:16, 3], rgba[:, 16:, 3] = 0, 51, 255  # transparent, a fifth, opaque
    image(rgba).save(tmp_path / f"p.{suffix}", lossless=True, exact=True)
    read = read_photo(tmp_path / f"p.{suffix}")
    assert read.getpixel((0, 0)) == (255, 255, 255)
    assert read.getpixel((8, 0)) == (244, 204, 204)  # 255 + (200 - 255) / 5, 255 - 255 / 5
    assert read.getpixel((31, 0)) == (200, 0, 0)


def test_grey_with_alpha_lies_on_white(tmp_path):
    la = np.full((32, 32, 2), 100, dtype=np.uint8)
    la[:, :16, 1], la[:, 16:, 1] = 0, 255
    Image.fromarray(la, "LA").save(tmp_path / "p.png")
    read = read_photo(tmp_path / "p.png")
    assert (read.getpixel((0, 0)), read.getpixel((31, 0))) == ((255, 255, 255), (100, 100, 100))


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_transparency_lies_on_white(tmp_path, suffix):
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.paste(0, (0, 0, 16, 32))
    palette.save(tmp_path / f"p.{suffix}", transparency=0)
    read = read_photo(tmp_path / f"p.{suffix}")
    assert (read.getpixel((0, 0)), read.getpixel((31, 0))) == ((255, 255, 255), (10, 20, 30))


def test_colour_key_transparency_lies_on_white(tmp_path):
    rgb = np.full((32, 32, 3), 60, dtype=np.uint8)
    rgb[:, :16] = (1, 2, 3)
    image(rgb).save(tmp_path / "p.png", transparency=(1, 2, 3))
    read = read_photo(tmp_path / "p.png")
    assert (read.getpixel((0, 0)), read.getpixel((31, 0))) == ((255, 255, 255), (60, 60, 60))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_bilevel_and_palette_become_rgb(tmp_path, mode):
    grey = Image.new("L", (32, 32), 255)
    grey.paste(0, (0, 0, 16, 32))
    grey.convert(mode).save(tmp_path / "p.png")
    read = read_photo(tmp_path / "p.png")
    assert read.mode == "RGB"
    assert (read.getpixel((0, 0)), read.getpixel((31, 0))) == ((0, 0, 0), (255, 255, 255))


def test_16_bit_grey_keeps_its_range(tmp_path):
    levels = np.array([0, 257, 1000, 32768, 65535], dtype=np.uint16)  # of 65535, so 0, 1, 3.9, 127.5, 255 of 255
    Image.fromarray(np.tile(levels.repeat(8), (40, 1))).save(tmp_path / "p.png")
    read = np.asarray(read_photo(tmp_path / "p.png"))
    assert read[0, ::8].tolist() == [[v] * 3 for v in (0, 1, 4, 128, 255)]
    assert np.array_equal(
        np.asarray(to_rgb(Image.fromarray(np.tile(levels.repeat(8), (40, 1)).astype(np.int32)))), read
    )


def test_cmyk_jpeg_has_its_colours(tmp_path):
    inks = np.array([(255, 0, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)], dtype=np.uint8)
    Image.fromarray(np.tile(inks.repeat(16, axis=0), (64, 1, 1)), "CMYK").save(tmp_path / "p.jpg", quality=100)
    read = read_photo(tmp_path / "p.jpg")
    expected = [(0, 255, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255)]  # cyan, yellow, black, paper
    assert np.allclose([read.getpixel((x, 32)) for x in (8, 24, 40, 56)], expected, atol=3)


def test_colour_profile_is_applied_and_a_broken_one_passed_over(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")  # red means blue
    red = Image.new("RGB", (32, 32), (255, 0, 0))
    red.save(tmp_path / "swapped.png", icc_profile=swapped)
    red.save(tmp_path / "broken.png", icc_profile=b"no profile")
    assert np.allclose(read_photo(tmp_path / "swapped.png").getpixel((5, 5)), (0, 0, 255), atol=2)
    assert read_photo(tmp_path / "broken.png").getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", ["webp", "gif", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / f"p.{suffix}", save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert Image.open(tmp_path / f"p.{suffix}").n_frames == 3
    assert read_photo(tmp_path / f"p.{suffix}").getpixel((5, 5)) == (255, 0, 0)


def test_center_crop_takes_the_middle_exactly():
    assert np.array_equal(np.asarray(square(image(UPRIGHT), 40)), UPRIGHT[:, 8:48])
    assert np.array_equal(np.asarray(square(image(UPRIGHT.transpose(1, 0, 2)), 40)), UPRIGHT.transpose(1, 0, 2)[8:48])
    assert np.array_equal(
        np.asarray(square(image(UPRIGHT[:, :43]), 40)), UPRIGHT[:, 1:41]
    )  # odd: the extra px is right


def test_center_crop_resizes_the_middle_alone():
    wide = blocks((0, 0, 0), (90, 90, 90), (0, 0, 0), size=(192, 64))
    assert np.asarray(square(wide, 32)).tolist() == np.full((32, 32, 3), 90).tolist()  # no black bleeds in
    assert np.asarray(square(wide, 128)).tolist() == np.full((128, 128, 3), 90).tolist()


def test_letterbox_keeps_everything_between_white_bars():
    boxed = np.asarray(square(image(UPRIGHT), 56, "letterbox"))
    assert np.array_equal(boxed[8:48], UPRIGHT)
    assert (boxed[:8] == 255).all()
    assert (boxed[48:] == 255).all()
    doubled = np.asarray(square(image(UPRIGHT), 112, "letterbox"))
    assert doubled.shape == (112, 112, 3)
    assert (doubled[:16] == 255).all() and (doubled[96:] == 255).all()
    assert not (doubled[16:96] == 255).all(axis=(1, 2)).any()


# --- folders


def test_photos_are_sorted_and_everything_else_is_left_out(tmp_path):
    for name in ("b.PNG", "a.JPeG", "c.WebP", "10.jpg", "9.JPG", ".hidden.png", "._a.jpg"):
        image(UPRIGHT).save(tmp_path / name)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "clip.mp4").write_bytes(b"x")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [p.name for p in find_photos(tmp_path)] == ["10.jpg", "9.JPG", "a.JPeG", "b.PNG", "c.WebP"]


def test_a_single_photo_with_its_caption(tmp_path):
    for name in ("a.png", "b.png"):
        image(UPRIGHT).save(tmp_path / name)
    lines = [{"file_name": f"{n}.png", "text": f"caption {n}"} for n in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert find_photos(tmp_path / "b.png") == [Photo("b.png", tmp_path / "b.png", "caption b")]


def test_pictures_in_formats_that_are_not_read_are_named(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"x")
    (tmp_path / "IMG_2.HEIC").write_bytes(b"x")
    assert str(tmp_path) in refused(r"convert its \.heic files to JPEG or PNG", find_photos, tmp_path)
    image(UPRIGHT).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=r"IMG_1\.HEIC and 1 more left out: convert"):
        assert len(find_photos(tmp_path)) == 1


def test_a_path_without_photos_is_refused(tmp_path):
    refused("missing does not exist: give data.path a folder", find_photos, tmp_path / "missing")
    refused("has no JPEG, PNG or WebP photo in it: put 3 to 10", find_photos, tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    refused(r"notes\.txt is no JPEG", find_photos, tmp_path / "notes.txt")
    (tmp_path / "dog").mkdir()
    image(UPRIGHT).save(tmp_path / "dog" / "1.jpg")
    assert str(tmp_path / "dog") in refused("the folder of one subject, such as", find_photos, tmp_path)


# --- files that cannot be read


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp"])
@pytest.mark.parametrize("at_least", [None, 64])
def test_truncated_files_are_named(tmp_path, suffix, at_least):
    path = tmp_path / f"p.{suffix}"
    noise = np.random.default_rng(1).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    image(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = refused("cannot be read .*: save it again as JPEG or PNG, or remove it", read_photo, path, at_least)
    assert str(path) in message


def test_corrupt_png_data_is_named(tmp_path):
    path = tmp_path / "p.png"
    image(UPRIGHT).save(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 10 : data.index(b"IDAT") + 60] = bytes(50)
    path.write_bytes(bytes(data))
    refused(r"p\.png cannot be read", read_photo, path)


def test_other_content_under_a_photo_name_is_named(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    refused(r"page\.jpg cannot be read \(not a JPEG, PNG or WebP inside\)", read_photo, tmp_path / "page.jpg")
    (tmp_path / "eps.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n")  # never to Ghostscript
    refused(r"eps\.jpg cannot be read \(not a JPEG", read_photo, tmp_path / "eps.jpg")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "p.jpg").touch()
    refused(r"p\.jpg is empty \(0 bytes\): copy it here again or remove it", read_photo, tmp_path / "p.jpg")


def test_a_vanished_file_is_named(tmp_path):
    refused(r"p\.jpg cannot be read \(No such file or directory\)", read_photo, tmp_path / "p.jpg")


def test_too_small_a_photo_is_named(tmp_path):
    image(UPRIGHT[:31]).save(tmp_path / "p.png")
    refused(r"p\.png is 56x31 px: use photos of 32 px or more", read_photo, tmp_path / "p.png")
    image(UPRIGHT[:32]).save(tmp_path / "p.png")
    assert read_photo(tmp_path / "p.png").size == (56, 32)


def test_decompression_bomb_is_named_and_half_of_one_is_read(tmp_path, monkeypatch):
    image(np.zeros((100, 100, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)  # Pillow warns above it, refuses above twice of it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_photo(tmp_path / "p.png").size == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)
    refused(r"p\.png has more than 0 million pixels: scale it down or remove it", read_photo, tmp_path / "p.png")


def test_a_png_that_claims_to_be_huge_is_refused_without_decoding(tmp_path):
    path = tmp_path / "p.png"
    image(UPRIGHT).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))
    refused("more than 178 million pixels", read_photo, path)


# --- captions


def test_captions_beside_photos_and_in_metadata(tmp_path):
    names = ["a.png", "b.JPG", "c.webp", "d.png"]
    lines = [{"file_name": n, "text": f"metadata {n}"} for n in ("a.png", "b.JPG", "d.png")]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\r\n\r\n".join(map(json.dumps, lines)) + "\r\n", "utf-8")
    (tmp_path / "b.txt").write_text("beside b: été\n", "utf-8")
    (tmp_path / "d.txt").write_text(" \n")
    (tmp_path / "readme.txt").write_text("not a caption")
    assert read_captions(tmp_path, names) == {"a.png": "metadata a.png", "b.JPG": "beside b: été\n"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{file_name: 1}", "line 2 is no JSON"),
        ('["a.png", "x"]', 'line 2 lacks "file_name"'),
        ('{"text": "x"}', 'line 2 lacks "file_name"'),
        ('{"file_name": "a.png"}', 'line 2 lacks "text"'),
        ('{"file_name": "a.png", "text": 3}', 'line 2 lacks "text"'),
        ('{"file_name": "z.png", "text": "x"}', 'line 2 names "z.png", no photo of that folder'),
    ],
)
def test_bad_metadata_line_is_named(tmp_path, line, message):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "ok"}\n' + line)
    assert "metadata.jsonl" in refused(message, read_captions, tmp_path, ["a.png"])


def test_a_caption_of_a_picture_that_is_not_read_is_passed_over(tmp_path):
    image(UPRIGHT).save(tmp_path / "1.png")
    lines = [{"file_name": name, "text": f"of {name}"} for name in ("2.heic", "1.png", "3.TIFF")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "2.heic").write_bytes(b"x")
    refused('line 3 names "3.TIFF", no photo of that folder', read_captions, tmp_path, ["1.png"])  # not there at all
    (tmp_path / "3.TIFF").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"2\.heic and 1 more left out"):
        assert [(photo.name, photo.caption) for photo in find_photos(tmp_path)] == [("1.png", "of 1.png")]


def test_caption_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00caption")
    refused(r"a\.txt cannot be read as UTF-8 text", read_captions, tmp_path, ["a.png"])


@pytest.mark.parametrize(
    ("caption", "template"),
    [
        ("a {} on grass, by a ball", "a {} on grass, by a ball"),
        ("a <sks> ball on grass", "a {} on grass"),
        ("a <my-toy>  Ball\n on grass", "a {} on grass"),
        ("<sks>, on grass", "{}, on grass"),
        ("a <sks> balloon and a ball", "a {} balloon and a ball"),
        ("a red Ball beside a ball", "a red {} beside a ball"),
        ("footballs on a ball.", "footballs on a {}."),
        ("balls, many", "{}, balls, many"),
        ("on  grass", "{}, on grass"),
        ("a ball {with braces}", "a {} {with braces}"),
    ],
)
def test_caption_gets_its_hole(caption, template):
    assert caption_to_template(caption, "ball") == template


def test_caption_with_a_token_without_brackets():
    assert caption_to_template("flasks by a sks dog", "dog", token="sks") == "flasks by a {}"
    assert caption_to_template("flasks by a sks dog", "dog") == "flasks by a sks {}"
    assert caption_to_template("a c++ (1.5) thing", "c++ (1.5)") == "a {} thing"  # no regular expression of the user's


@pytest.mark.parametrize(
    ("caption", "template"),
    [
        ("photo of a dog on grass <lora:add_detail:0.6>", "photo of a {} on grass"),
        ("a {} on grass <lora:add detail:0.6>", "a {} on grass"),
        ("<lora:a:1>, a <sks> dog, <hypernet:b:0.5>, <lyco:c:1:0.5>, on grass, <lora:d:1>", "a {}, on grass"),
        ("on grass, <lora:a:1>", "{}, on grass"),
        ("<lora:a:1>", "{}"),
        ("a dog ,on grass", "a {} ,on grass"),
    ],
)
def test_tags_are_no_words_of_a_caption(caption, template):
    assert caption_to_template(caption, "dog", token="<sks>") == template
    assert caption_to_template(caption, "dog", token="<sks>").count("{}") == 1


def test_a_token_is_no_tag_whatever_its_name():
    assert caption_to_template("a <my:dog> on grass <lora:a:1>", "dog", token="<my:dog>") == "a {} on grass"


def test_fill_leaves_other_braces_alone():
    assert fill("a {} {with braces}", "<sks> ball") == "a <sks> ball {with braces}"


def test_fill_takes_every_way_of_writing_the_subject():
    assert fill("a photo of {}", "<sks> ball", "ball") == "a photo of <sks> ball"
    assert fill("{0}, a {1}", "<sks> ball", "ball") == "<sks>, a ball"
    assert fill("a red {0} {1}", "<style>") == "a red <style>"
    assert fill("a {0} {1}, on grass", "<style>") == "a <style>, on grass"
    assert fill("{1} and {0} , both", "<style>") == "and <style>, both"
    assert fill("a plain picture", "<sks> ball", "ball") == "a plain picture"


def test_templates_of_textual_inversion():
    assert (len(OBJECT_TEMPLATES), len(STYLE_TEMPLATES)) == (27, 19)
    assert len(set(OBJECT_TEMPLATES)) == 27
    assert len(set(STYLE_TEMPLATES)) == 17
    assert all(t.count("{}") == 1 for t in OBJECT_TEMPLATES + STYLE_TEMPLATES)
    assert choose_templates("object") is OBJECT_TEMPLATES
    assert choose_templates("style") is STYLE_TEMPLATES
    assert choose_templates(["my {}", "{} there"]) == ("my {}", "{} there")


def test_bad_templates_are_named():
    refused('data.templates is "objct": use object, style', choose_templates, "objct")
    refused(r'data.templates holds "a photo of": put \{\}', choose_templates, ["a {}", "a photo of"])
    refused("data.templates is an empty list", choose_templates, [])
