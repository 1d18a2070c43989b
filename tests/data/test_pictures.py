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


def saved(folder, make, images, suffix="png", **options):
    for number, image in enumerate(images):
        made = make(Image.fromarray(image.numpy()))
        path = folder / f"{number:03}.{suffix}"
        made.save(path, **options)
        yield pictures.read(path)


def tilted(picture):
    """Turned, with an EXIF tag that tells a viewer to turn it back."""
    turned = picture.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    return turned


AS_THEY_ARE = {
    "grey": lambda picture: picture,
    "in colour": lambda picture: picture.convert("RGB"),
    "palette": lambda picture: picture.convert("P"),
    "16 bits": lambda picture: Image.fromarray(np.asarray(picture).astype(np.uint16) * 257),
    "opaque alpha": lambda picture: picture.convert("RGBA"),
}


@pytest.mark.parametrize("kind", AS_THEY_ARE)
def test_a_picture_of_the_data_set_is_itself(tmp_path, kind):
    images = TEST[::10]
    for image, picture in zip(images, saved(tmp_path, AS_THEY_ARE[kind], images), strict=True):
        assert torch.equal(picture.pixels, image)
        assert not picture.inverted


def test_inverted_pictures_are_inverted_back(tmp_path):
    for image, picture in zip(TEST, saved(tmp_path, ImageOps.invert, TEST), strict=True):
        assert torch.equal(picture.pixels, image)
        assert picture.inverted
    assert torch.equal(pictures.read(tmp_path / "000.png", invert=False).pixels, 255 - TEST[0])


def test_a_camera_held_upright(tmp_path):
    images = TEST[:50]
    options = {"exif": tilted(Image.new("L", (28, 28))).getexif()}
    for image, picture in zip(images, saved(tmp_path, tilted, images, **options), strict=True):
        assert torch.equal(picture.pixels, image)


@needs_all_images
def test_the_border_tells_for_all_images_of_the_data_set():
    data = sources.load("system")
    for images in (data.train_images, data.test_images):
        border = (
            torch.cat([images[:, 0], images[:, -1], images[:, 1:-1, 0], images[:, 1:-1, -1]], 1)
            .float()
            .mean(1)
        )
        assert (border < 127).all() and (255 - border > 127).all()


def in_a_photograph(picture):
    """On a large white ground, off the middle."""
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


@pytest.mark.parametrize("kind", RESIZED)
def test_resized_pictures_keep_their_class(tmp_path, network, kind):
    images = TEST[:500]
    read = [picture.pixels for picture in saved(tmp_path, RESIZED[kind], images)]
    agreed = (network(read) == network(images)).float().mean()
    assert agreed >= 0.95


def test_resized_as_jpeg(tmp_path, network):
    images = TEST[:500]
    read = [p.pixels for p in saved(tmp_path, RESIZED["ten times"], images, "jpg")]
    assert (network(read) == network(images)).float().mean() >= 0.95


def test_a_thing_on_a_large_ground_is_found_and_centred(tmp_path):
    rows = []
    for picture in saved(tmp_path, in_a_photograph, TEST[:100]):
        assert picture.inverted
        lit = picture.pixels > 13
        assert (
            max(int(lit.any(0).sum()), int(lit.any(1).sum())) >= 26
        )  # its longer side fills the picture
        inside = lit.any(1).nonzero().flatten(), lit.any(0).nonzero().flatten()
        rows += [abs(int(part[0]) - (27 - int(part[-1]))) for part in inside]
    assert np.mean(rows) < 2  # margins of the two sides


def test_transparent_is_white(tmp_path):
    sheet = Image.new("RGBA", (80, 60), (0, 0, 0, 0))
    sheet.paste((200, 20, 20, 255), (20, 10, 60, 50))
    sheet.save(tmp_path / "a.png")
    picture = pictures.read(tmp_path / "a.png")
    assert picture.inverted and picture.pixels.float().mean() > 100


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", 1), ("float32", 255), ("int32", 255), ("int32", 65_535)]
)
def test_values_of_32_bits_are_taken_by_their_range(tmp_path, dtype, most):
    values = TEST[0].numpy().astype("float64") / 255 * most
    Image.fromarray(values.astype(dtype)).save(tmp_path / "a.tif")
    assert torch.equal(pictures.read(tmp_path / "a.tif").pixels, TEST[0])


@pytest.mark.parametrize("size", [(28, 28), (60, 40)])
def test_one_colour_shows_nothing(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    with pytest.raises(pictures.PictureError, match="nothing but one colour"):
        pictures.read(tmp_path / "a.png")


def test_broken_files_are_named_and_the_others_read(tmp_path, capsys):
    names = broken_files(tmp_path)
    assert len(names) == 20
    Image.fromarray(TEST[0].numpy()).save(tmp_path / "good.png")
    paths = [tmp_path / name for name in [*names, "good.png", "missing.png"]]
    (read,), unread = pictures.read_all(paths)
    assert (read.path, unread) == (tmp_path / "good.png", 21)
    err = capsys.readouterr().err
    for name in [*names, "missing.png"]:
        assert f"not read: {tmp_path / name}: " in err, name
    with pytest.raises(RunFailed, match="None of 1 pictures could be read"):
        pictures.read_all([tmp_path / "half.png"])


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (400, 400)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(pictures.PictureError, match=r"large.png: .*exceeds limit"):
        pictures.read(tmp_path / "large.png")


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.PNG", "deep/c.jpg", "deep/notes.txt", "d.txt", "[1].png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"")
    found = [
        path.as_posix() for path in pictures.find(["in/d.txt", "in", "in/*.txt", "in/[1].png"])
    ]
    assert found == ["in/d.txt", "in/[1].png", "in/a.PNG", "in/b.png", "in/deep/c.jpg"]
    (tmp_path / "in/report.pdf").write_bytes(b"")  # Pillow writes them, and reads none
    (tmp_path / "in/folder.txt").mkdir()
    found = [path.as_posix() for path in pictures.find(["in/", "in/*.txt"])]
    assert found == ["in/[1].png", "in/a.PNG", "in/b.png", "in/deep/c.jpg", "in/d.txt"]
    with pytest.raises(pictures.UserError, match="There is no picture"):
        pictures.find([""])
    assert pictures.find([f"{tmp_path}/in/*.png"]) == [
        tmp_path / "in/[1].png",
        tmp_path / "in/b.png",
    ]
    with pytest.raises(pictures.UserError, match=r"There is no picture in in/\*.gif"):
        pictures.find(["in/*.gif"])
