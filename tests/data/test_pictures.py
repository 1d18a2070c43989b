"""Conversion of image files to the style of the data set."""

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from bn_lightning import Classifier
from bn_lightning.data import pictures, sources
from bn_lightning.errors import RunFailed
from tests.conftest import needs_all_images
from tests.support.broken_pictures import broken_files

TEST = sources.load("sample").test_images


@pytest.fixture(scope="module")
def network(trained):
    model = Classifier.load_from_checkpoint(
        trained[0] / "checkpoints/best.ckpt", weights_only=True, map_location="cpu"
    ).eval()

    def classes(images):
        with torch.no_grad():
            return model(torch.stack(list(images)).unsqueeze(1) / 255).argmax(1)

    return classes


def save_and_read(folder, change, images, suffix="png", **options):
    """Save each image after a change, and yield what `pictures.read` returns for the file."""
    for number, image in enumerate(images):
        path = folder / f"{number:03}.{suffix}"
        # Most of the time would be spent on compression.
        change(Image.fromarray(image.numpy())).save(path, compress_level=1, **options)
        yield pictures.read(path)


def rotated(picture):
    """Return the image rotated, with the EXIF tag of its original orientation."""
    result = picture.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    result.getexif()[0x0112] = 6
    return result


MODES = {
    "grey": lambda picture: picture,
    "in colour": lambda picture: picture.convert("RGB"),
    "palette": lambda picture: picture.convert("P"),
    "16 bits": lambda picture: Image.fromarray(np.asarray(picture).astype(np.uint16) * 257),
    "opaque alpha": lambda picture: picture.convert("RGBA"),
}


@pytest.mark.parametrize("kind", MODES)
def test_images_of_the_data_set_are_not_changed(tmp_path, kind):
    images = TEST[::10]
    for image, picture in zip(images, save_and_read(tmp_path, MODES[kind], images), strict=True):
        assert torch.equal(picture.pixels, image)
        assert not picture.inverted


def test_inverted_images_are_inverted_back(tmp_path):
    for image, picture in zip(TEST, save_and_read(tmp_path, ImageOps.invert, TEST), strict=True):
        assert torch.equal(picture.pixels, image)
        assert picture.inverted
    assert torch.equal(pictures.read(tmp_path / "000.png", invert=False).pixels, 255 - TEST[0])


def test_exif_orientation_is_applied(tmp_path):
    images = TEST[:50]
    options = {"exif": rotated(Image.new("L", (28, 28))).getexif()}
    for image, picture in zip(
        images, save_and_read(tmp_path, rotated, images, **options), strict=True
    ):
        assert torch.equal(picture.pixels, image)


@needs_all_images
def test_the_border_is_dark_in_all_images_of_the_data_set():
    data = sources.load("system")
    for images in (data.train_images, data.test_images):
        border = (
            torch.cat([images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]], 1)
            .float()
            .mean(1)
        )
        assert (border < 127).all() and (255 - border > 127).all()


def in_a_photograph(picture):
    """Return the image on a large white background, not centred."""
    sheet = Image.new("RGB", (400, 300), "white")
    sheet.paste(ImageOps.invert(picture).resize((140, 140), Image.Resampling.BICUBIC), (40, 90))
    return sheet


RESIZED = {
    "twice": lambda picture: picture.resize((56, 56), Image.Resampling.BILINEAR),
    "ten times": lambda picture: picture.resize((280, 280), Image.Resampling.BICUBIC),
    "an odd size, inverted": lambda picture: ImageOps.invert(
        picture.resize((101, 101), Image.Resampling.LANCZOS)
    ),
}


@pytest.mark.parametrize(
    "kind", ["twice", pytest.param("ten times", marks=pytest.mark.slow), "an odd size, inverted"]
)
def test_resized_images_keep_their_class(tmp_path, network, kind):
    images = TEST[:500]
    read = [picture.pixels for picture in save_and_read(tmp_path, RESIZED[kind], images)]
    agreed = (network(read) == network(images)).float().mean()
    assert agreed >= 0.95


def test_resized_jpeg_images_keep_their_class(tmp_path, network):
    images = TEST[:500]
    read = [p.pixels for p in save_and_read(tmp_path, RESIZED["ten times"], images, "jpg")]
    assert (network(read) == network(images)).float().mean() >= 0.95


def test_an_object_on_a_large_background_is_trimmed_and_centred(tmp_path):
    off_centre = []
    for picture in save_and_read(tmp_path, in_a_photograph, TEST[:100]):
        assert picture.inverted
        is_object = picture.pixels > 13
        sides = int(is_object.any(0).sum()), int(is_object.any(1).sum())
        assert max(sides) >= 26
        rows = is_object.any(1).nonzero().flatten()
        columns = is_object.any(0).nonzero().flatten()
        # The margins on opposite sides are about equal.
        off_centre += [abs(int(place[0]) - (27 - int(place[-1]))) for place in (rows, columns)]
    assert np.mean(off_centre) < 2


def on_a_background(brightness):
    def place(picture):
        sheet = Image.new("L", (400, 300), brightness)
        garment = picture.point(lambda value: 255 - value if value > 5 else brightness)
        sheet.paste(garment.resize((140, 140), Image.Resampling.BICUBIC), (130, 80))
        return sheet

    return place


def test_a_grey_background_misleads_the_network(tmp_path, network):
    """The guide `deployment.md` says so."""
    images = TEST[:80]
    agreed = {}
    for brightness in (255, 128):
        place = on_a_background(brightness)
        read = [picture.pixels for picture in save_and_read(tmp_path, place, images)]
        agreed[brightness] = (network(read) == network(images)).float().mean()
        # `--grid` shows the background that the network sees.
        edge = torch.stack(read)[:, :, 0].float()
        assert (edge.median() - (255 - brightness)).abs() <= 2
    assert agreed[255] >= 0.9 and agreed[128] <= 0.6


def test_transparency_becomes_white(tmp_path):
    sheet = Image.new("RGBA", (80, 60), (0, 0, 0, 0))
    sheet.paste((200, 20, 20, 255), (20, 10, 60, 50))
    sheet.save(tmp_path / "a.png")
    picture = pictures.read(tmp_path / "a.png")
    assert picture.inverted and picture.pixels.float().mean() > 100


@pytest.mark.parametrize(
    ("dtype", "white"), [("float32", 1), ("float32", 255), ("int32", 255), ("int32", 65_535)]
)
def test_values_of_32_bits_are_scaled_by_their_range(tmp_path, dtype, white):
    values = TEST[0].numpy().astype("float64") / 255 * white
    Image.fromarray(values.astype(dtype)).save(tmp_path / "a.tif")
    assert torch.equal(pictures.read(tmp_path / "a.tif").pixels, TEST[0])


@pytest.mark.parametrize("size", [(28, 28), (60, 40)])
def test_an_image_with_a_single_colour_is_refused(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    with pytest.raises(pictures.PictureError, match="single colour"):
        pictures.read(tmp_path / "a.png")


def test_unreadable_files_are_reported_and_the_others_are_read(tmp_path, capsys):
    names = broken_files(tmp_path)
    assert len(names) == 20
    Image.fromarray(TEST[0].numpy()).save(tmp_path / "good.png")
    paths = [tmp_path / name for name in [*names, "good.png", "missing.png"]]
    (read,), num_unreadable = pictures.read_all(paths)
    assert (read.path, num_unreadable) == (tmp_path / "good.png", 21)
    err = capsys.readouterr().err
    for name in [*names, "missing.png"]:
        assert f"cannot read {tmp_path / name}: " in err, name
    with pytest.raises(RunFailed, match="No image could be read"):
        pictures.read_all([tmp_path / "half.png"])


# Pillow only warns of a picture that has less than twice the allowed pixels.
@pytest.mark.parametrize("limit", [50_000, 100_000])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    Image.new("L", (400, 400)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(pictures.PictureError, match=r"large.png: .*exceeds limit"):
        pictures.read(tmp_path / "large.png")


def test_files_folders_and_patterns_are_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.PNG", "deep/c.jpg", "deep/notes.txt", "d.txt", "[1].png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"")
    found = [
        path.as_posix() for path in pictures.find(["in/d.txt", "in", "in/*.txt", "in/[1].png"])
    ]
    assert found == ["in/d.txt", "in/[1].png", "in/a.PNG", "in/b.png", "in/deep/c.jpg"]
    (tmp_path / "in/report.pdf").write_bytes(b"")  # Pillow only writes PDF
    (tmp_path / "in/folder.txt").mkdir()
    found = [path.as_posix() for path in pictures.find(["in/", "in/*.txt"])]
    assert found == ["in/[1].png", "in/a.PNG", "in/b.png", "in/deep/c.jpg", "in/d.txt"]
    with pytest.raises(pictures.UserError, match="No images were found"):
        pictures.find([""])
    assert pictures.find([f"{tmp_path}/in/*.png"]) == [
        tmp_path / "in/[1].png",
        tmp_path / "in/b.png",
    ]
    with pytest.raises(pictures.UserError, match=r"No images were found in in/\*.gif"):
        pictures.find(["in/*.gif"])


# Other data sets


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_size_of_the_data_is_read_as_it_is(tmp_path, channels):
    colours = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    expected = torch.from_numpy(colours).permute(2, 0, 1)
    if channels == 1:  # ITU-R 601-2
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        expected = (expected * weights).sum(0).round().to(torch.uint8)
    pixels = pictures.read_as(tmp_path / "a.png", (24, 20), channels).pixels
    assert pixels.shape == expected.shape and pixels.dtype == torch.uint8
    assert (pixels.int() - expected.int()).abs().max() <= (channels == 1)
    inverted = pictures.read_as(tmp_path / "a.png", (24, 20), channels, invert=True)
    assert torch.equal(inverted.pixels, 255 - pixels) and inverted.inverted


@pytest.mark.parametrize("size", [(240, 50), (24, 100)])
def test_the_centre_is_cropped(tmp_path, size):
    """The centre, of the shape of the data, is white, and the rest is black."""
    picture = Image.new("RGB", size, "black")
    side = min(size[0] // 6, size[1] // 5)  # the data have 24x20 pixels
    width, height = side * 6, side * 5
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    picture.paste("white", (left, top, left + width, top + height))
    picture.save(tmp_path / "a.png")
    assert (pictures.read_as(tmp_path / "a.png", (24, 20), 3).pixels > 230).all()


def test_other_numbers_of_channels_are_refused(tmp_path):
    with pytest.raises(pictures.UserError, match=r"1 or 3 channels, but the network is for 4"):
        pictures.read_as(tmp_path / "a.png", (24, 20), 4)


def test_unreadable_files_have_one_clear_line(tmp_path, recwarn, capfd):
    names = [name for name in broken_files(tmp_path) if name != "blank.png"]
    names += ["missing.jpg", "folder.jpg", "itself.jpg", "secret.jpg"]
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    Image.new("RGB", (50, 50)).save(tmp_path / "secret.jpg")
    (tmp_path / "secret.jpg").chmod(0)
    if os.access(tmp_path / "secret.jpg", os.R_OK):  # as root
        names.remove("secret.jpg")
    reasons = {}
    for name in names:
        path = tmp_path / name
        with pytest.raises(pictures.PictureError) as raised:
            pictures.read_as(path, (24, 20), 3)
        where, reasons[name] = str(raised.value).split(": ", 1)
        assert where == str(path)
    assert all(reason and "\n" not in reason for reason in reasons.values())
    assert reasons["text.png"] == "not a readable image"
    assert reasons["missing.jpg"] == "the file does not exist"
    assert reasons["folder.jpg"] == os.strerror(errno.EISDIR)
    assert reasons["itself.jpg"] == os.strerror(errno.ELOOP)
    assert reasons.get("secret.jpg", os.strerror(errno.EACCES)) == os.strerror(errno.EACCES)
    assert not recwarn and capfd.readouterr() == ("", "")


def colour_of(path):
    """Return the colour of an image file that has a single one."""
    pixels = pictures.read_as(path, (6, 4), 3).pixels.flatten(1)
    assert (pixels == pixels[:, :1]).all()
    return tuple(pixels[:, 0].tolist())


def test_unusual_images_are_read(tmp_path, recwarn):
    colour = (200, 30, 90)
    Image.new("RGB", (1, 1), colour).save(tmp_path / "dot.png")
    assert colour_of(tmp_path / "dot.png") == colour
    frames = [Image.new("RGB", (30, 20), c) for c in (colour, "white", "black")]
    frames[0].save(tmp_path / "a.gif")
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    assert colour_of(tmp_path / "a.gif") == colour_of(tmp_path / "animated.gif") == colour
    Image.fromarray(np.full((20, 30), 0x4321, np.uint16)).save(tmp_path / "16.png")
    assert colour_of(tmp_path / "16.png") == (0x43,) * 3
    palette = Image.new("P", (30, 20), 1)
    palette.putpalette([0, 0, 0, *colour])
    palette.save(tmp_path / "opaque.png", transparency=0)
    palette.save(tmp_path / "transparent.png", transparency=1)
    assert colour_of(tmp_path / "opaque.png") == colour
    assert colour_of(tmp_path / "transparent.png") == (255, 255, 255)
    # Cameras write such EXIF data too. The pixels are intact.
    frames[0].save(tmp_path / "broken-exif.png", exif=b"Exif\0\0II" + bytes(range(40)))
    frames[0].save(tmp_path / "empty-exif.png", exif=b"Exif\0\0")
    assert colour_of(tmp_path / "broken-exif.png") == colour
    assert colour_of(tmp_path / "empty-exif.png") == colour
    assert not recwarn


def test_an_inverted_cmyk_jpeg_has_its_colours(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    picture = Image.fromarray(colours).resize((40, 32), Image.Resampling.BICUBIC)
    picture.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    # Adobe stores the values of CMYK inverted.
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    pixels = pictures.read_as(tmp_path / "a.jpg", (40, 32), 3).pixels.int()
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert (pixels - expected).abs().float().mean() < 3
    assert (pixels - expected).abs().max() < 30
