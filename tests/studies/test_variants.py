"""The variants that the options of `compare` define."""

import pytest

from bn_lightning.errors import UserError
from bn_lightning.studies import variants
from bn_lightning.studies.variants import Variant


def names(*arguments):
    return [variant.name for variant in variants.parse(list(arguments))[1]]


def baselines(*arguments):
    return [variant.baseline for variant in variants.parse(list(arguments))[1]]


def test_grids_and_ablations_define_variants():
    grid = ("--norm", "a", "b", "--vary.model.lr", "1", "2")
    assert names(*grid) == ["a lr=1", "a lr=2", "b lr=1", "b lr=2"]
    assert names("--vary.model.lr=1") == ["lr=1"]
    assert names() == ["base"]
    assert names("--vary.config", "configs/x.yaml", "configs/y.yaml") == ["x", "y"]
    ablation = ("--ablate.data.flip", "false", "--ablate.model.lr", "1", "2")
    assert names(*ablation) == ["base", "flip=false", "lr=1", "lr=2"]


def test_the_baseline_has_the_first_norm_or_is_the_first_variant():
    grid = ("--norm", "a", "b", "--vary.model.lr", "1", "2", "--ablate.data.flip", "true")
    assert baselines(*grid) == ["a lr=1", "a lr=2", "a lr=1", "a lr=2", "a lr=1"]
    grid = ("--vary.model.lr", "1", "2", "--vary.model.norm", "a", "b")
    assert baselines(*grid) == ["lr=1 a", "lr=1 a", "lr=2 a", "lr=2 a"]
    assert baselines("--vary.model.lr", "1", "2") == ["lr=1", "lr=1"]


def test_several_baselines_are_named_by_their_norm():
    def label(*arguments):
        return variants.baseline_label(variants.parse(list(arguments))[1])

    networks, norms = ("--vary.model.network", "x", "y"), ("--vary.model.norm", "a", "b")
    assert label(*networks, *norms) == label(*norms, *networks) == "a"
    assert label(*networks, "--norm", "a") == "a network=x"
    assert label(*networks) == "network=x"


def test_folds_are_repetitions_and_no_variants():
    def repeated(*arguments):
        options, found, _ = variants.parse(list(arguments), ["data.fold"])
        return [str(one) for one in options.repetitions], [variant.name for variant in found]

    folds = ("--vary.data.fold", "0", "1")
    assert repeated("--norm", "a", *folds) == (["seed 0, fold 0", "seed 0, fold 1"], ["a"])
    assert repeated(*folds, "--seeds", "2")[0] == [
        f"seed {seed}, fold {fold}" for seed in (0, 1) for fold in (0, 1)
    ]
    assert repeated("--norm", "a") == (["seed 0", "seed 1", "seed 2"], ["a"])
    # Without the declaration of the data module, folds are variants.
    assert names(*folds) == ["fold=0", "fold=1"]


def test_settings_with_the_same_last_part_keep_their_full_names():
    found = names("--vary.model.args.size", "1", "--vary.data.args.size", "2")
    assert found == ["model.args.size=1 data.args.size=2"]


def test_settings_of_a_variant_override_common_ones_which_override_its_configs():
    arguments = ["--ablate.model.lr", "2", "--model.lr", "1", "--config", "x.yaml"]
    _, [_, other], common = variants.parse(arguments)
    assert other.arguments(common) == ["--model.lr", "1", "--config", "x.yaml", "--model.lr", "2"]
    variant = Variant("y lr=2", "y lr=2", ("y.yaml",), (("model.lr", "2"),))
    config, settings = ["--config", "y.yaml"], ["--model.lr", "2"]
    assert variant.arguments(["--model.lr", "1"]) == [*config, "--model.lr", "1", *settings]


def test_the_folder_name_of_a_variant_has_no_special_characters():
    assert Variant("my.Norm lr=1e-3", "", (), ()).folder == "my.Norm,lr=1e-3"
    assert Variant("callbacks=[a/b: c]", "", (), ()).folder == "callbacks=,a,b,c,"


def test_long_names_of_variants_have_short_folders_that_differ():
    names = ["x" * 200, *(f"{'x' * 300}{end}" for end in "ab")]
    folders = [Variant(name, "", (), ()).folder for name in names]
    assert folders[0] == names[0]
    assert all(len(folder) < 200 for folder in folders[1:]) and len(set(folders)) == 3


def test_options_are_separated_from_settings_of_fit():
    options, _, common = variants.parse(["--seeds", "5", "--steps_to", "0.8", "--model.lr=1"])
    assert (options.seeds, options.jobs, options.name, options.steps_to) == (5, 1, "compare", 0.8)
    assert common == ["--model.lr=1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed_everything", "3"), "Use --seeds N instead"),
        (
            ("--model.norm=custom", "--norm", "none"),
            "--model.norm cannot be used together with --norm",
        ),
        (("--norm", "a", "--vary.model.norm", "b"), "Norms are given twice"),
        (("--seeds", "0"), "--seeds is 0; it must be at least 1"),
        (("--jobs", "0"), "--jobs is 0; it must be at least 1"),
        (("--seeds", "many"), "argument --seeds: invalid int value: 'many'"),
        (("--steps_to", "high"), "argument --steps_to: invalid float value: 'high'"),
        (("--vary.seed_everything", "1", "2"), "seed_everything cannot be varied"),
        (("--ablate.name", "x"), "name cannot be varied"),
        (("--vary.config", "a/x.yaml", "b/x.yaml"), "Two variants have the name 'x'"),
        (("--vary.model.norm", "A", "a"), "Two variants have the name 'a'"),
    ],
)
def test_invalid_options_are_refused(arguments, message):
    with pytest.raises(UserError) as caught:
        names(*arguments)
    assert message in str(caught.value)
