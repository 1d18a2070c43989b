"""From the options of `compare` to the variants that are trained."""

import pytest

from bn_lightning.errors import UserError
from bn_lightning.studies import variants
from bn_lightning.studies.variants import Variant


def names(*arguments):
    return [variant.name for variant in variants.parse(list(arguments))[1]]


def references(*arguments):
    return [variant.reference for variant in variants.parse(list(arguments))[1]]


def test_the_variants_of_a_grid_and_of_an_ablation():
    grid = ("--norm", "a", "b", "--vary.model.lr", "1", "2")
    assert names(*grid) == ["a lr=1", "a lr=2", "b lr=1", "b lr=2"]
    assert names("--vary.model.lr=1") == ["lr=1"]
    assert names() == ["base"]
    assert names("--vary.config", "configs/x.yaml", "configs/y.yaml") == ["x", "y"]
    ablation = ("--ablate.data.flip", "false", "--ablate.model.lr", "1", "2")
    assert names(*ablation) == ["base", "flip=false", "lr=1", "lr=2"]


def test_each_variant_is_compared_with_the_first_norm_or_the_first_point():
    grid = ("--norm", "a", "b", "--vary.model.lr", "1", "2", "--ablate.data.flip", "true")
    assert references(*grid) == ["a lr=1", "a lr=2", "a lr=1", "a lr=2", "a lr=1"]
    grid = ("--vary.model.lr", "1", "2", "--vary.model.norm", "a", "b")
    assert references(*grid) == ["lr=1 a", "lr=1 a", "lr=2 a", "lr=2 a"]
    assert references("--vary.model.lr", "1", "2") == ["lr=1", "lr=1"]


def test_settings_whose_last_words_are_the_same_have_their_whole_names():
    found = names("--vary.model.args.size", "1", "--vary.data.args.size", "2")
    assert found == ["model.args.size=1 data.args.size=2"]


def test_settings_of_a_variant_are_stronger_than_common_ones_and_configs_weaker():
    arguments = ["--ablate.model.lr", "2", "--model.lr", "1", "--config", "x.yaml"]
    _, [_, other], common = variants.parse(arguments)
    assert other.arguments(common) == ["--model.lr", "1", "--config", "x.yaml", "--model.lr", "2"]
    variant = Variant("y lr=2", "y lr=2", ("y.yaml",), (("model.lr", "2"),))
    weak, strong = ["--config", "y.yaml"], ["--model.lr", "2"]
    assert variant.arguments(["--model.lr", "1"]) == [*weak, "--model.lr", "1", *strong]


def test_the_folder_of_a_variant_is_a_file_name():
    assert Variant("my.Norm lr=1e-3", "", (), ()).folder == "my.Norm,lr=1e-3"
    assert Variant("callbacks=[a/b: c]", "", (), ()).folder == "callbacks=,a,b,c,"


def test_options():
    options, _, common = variants.parse(["--seeds", "5", "--steps_to", "0.8", "--model.lr=1"])
    assert (options.seeds, options.jobs, options.name, options.steps_to) == (5, 1, "compare", 0.8)
    assert common == ["--model.lr=1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seed_everything", "3"), "and --seeds N, not"),
        (("--model.norm=custom", "--norm", "none"), "What is compared is given by --norm"),
        (("--norm", "a", "--vary.model.norm", "b"), "Norms are given twice"),
        (("--seeds", "0"), "--seeds is 0; it must be at least 1"),
        (("--jobs", "0"), "--jobs is 0; it must be at least 1"),
        (("--seeds", "many"), "argument --seeds: invalid int value: 'many'"),
        (("--steps_to", "high"), "argument --steps_to: invalid float value: 'high'"),
        (("--vary.seed_everything", "1", "2"), "seed_everything cannot be varied"),
        (("--ablate.name", "x"), "name cannot be varied"),
        (("--vary.config", "a/x.yaml", "b/x.yaml"), "Two variants are called 'x'"),
        (("--vary.model.norm", "A", "a"), "Two variants are called 'a'"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises(UserError) as caught:
        names(*arguments)
    assert said in str(caught.value)
