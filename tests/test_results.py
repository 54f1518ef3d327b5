"""assets/results.py: how results are counted, on logs made by hand."""

import json

import pytest

from assets import results
from data import DATASETS


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Keeps the log of a run with such a score in a folder of its own."""
    monkeypatch.setattr(results, "ASSETS", tmp_path)
    (tmp_path / "logs").mkdir()

    def log(settings, name, miou, crop=129, last=400):
        args = dict.fromkeys("warmup_iters batch_size backbone optimizer lr head_lr torch commit root".split(), "?")
        lines = [{"event": "train", "step": step, "kept": step / 400, "correct": 0.5} for step in (100, 200, 300, 400)]
        iou = {name: miou for name in results.CLASSES["pascal"]} | {"cow": 0.0, "train": 0.0}
        lines += [{"event": "val", "step": last, "miou": miou, "boundary_miou": miou / 2, "iou": iou}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(json.dumps(args | {"iters": 400, "crop": crop}))
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        results.keep(settings, tmp_path / name)

    return log


def test_an_interval_is_that_of_the_differences_of_the_seeds_that_both_have():
    assert results.difference({0: 3.0, 1: 5.0, 2: 7.0}, {0: 1.0, 1: 4.0, 2: 4.0, 3: 9.0}) == "+2.00 ± 2.48"
    ten = {seed: float(seed % 2) for seed in range(10)}  # standard deviation 0.527, 9 degrees of freedom
    assert results.difference(ten, dict.fromkeys(ten, 0.0)) == f"+0.50 ± {2.262 * 0.52705 / 10**0.5:.2f}"
    assert results.difference({0: 3.0}, {0: 1.0}) == "+2.00" and results.difference({}, {0: 1.0}) == ""


def test_a_third_of_the_classes_of_a_dataset_is_rare():
    assert all(sorted(classes) == sorted(DATASETS[dataset].classes) for dataset, classes in results.CLASSES.items())
    assert [len(results.RARE[dataset]) for dataset in ("pascal", "camvid")] == [7, 4]


def test_a_cell_is_mean_seeds_and_paired_difference_and_shares_are_those_late_in_a_run(logs):
    for seed, (ours, theirs) in enumerate([(30.0, 28.0), (31.0, 30.0), (32.0, 29.0)]):
        logs("fair", f"183-s4mc-{seed}", ours)
        logs("fair", f"183-fixmatch-{seed}", theirs)
    logs("fair", "183-s4mc-3", 31.0)  # has no partner
    logs("fair", "732-s4mc-0", 50.0), logs("fair", "732-preset-0", 51.0), logs("fair", "732-fixmatch-0", 49.0)
    logs("camvid", "46-dpa-0", 0.0)  # is in no table of these
    readme, page = results.sections("fair")
    assert "| S4MC + FixMatch (the paper) | 31.00 (4): +2.00 ± 2.48 | 15.50: +1.00 ± 1.24 |" in readme
    assert f"| {31 / 2:.2f}: +1.00 ± 1.24 | {31 * 6 / 7:.2f}: +1.71 ± 2.13 |" in page  # of seven rare ones one is 0
    assert f" | {(75 + 100) / 2:.2f} | 50.00 | 50.00 (1): +1.00 |" in page and "DPA" not in page
    assert "[ours] |  |  |  |  |  | 51.00 (1): +2.00 |" in page  # of one list only
    assert "| preset of photographs - FixMatch |  |  |  | +2.00 |" in page


def test_few_masks_show_the_mean_and_each_seed(logs):
    for seed, miou in enumerate((80.0, 82.04)):
        logs("people", f"5min-rival-{seed}", miou)
    columns = [("5 minutes", "mIoU", "5min"), ("15 minutes", "mIoU", "15min")]
    text = results.seed_table(results.scores_of("people"), columns)
    assert "| Unet of segmentation_models_pytorch, supervised | 81.0 (80.0, 82.0) |  |" in text


def test_runs_of_other_settings_and_unfinished_ones_are_refused(logs):
    logs("fair", "183-s4mc-0", 30.0)
    logs("fair", "183-s4mc-1", 30.0, crop=257)
    with pytest.raises(SystemExit, match="crop is 257, in others 129"):
        results.read("fair")
    with pytest.raises(SystemExit, match="is at step 200 of 400"):
        logs("fair", "183-s4mc-2", 30.0, last=200)


def test_a_method_without_a_title_is_refused(logs):
    logs("fair", "183-fixmatsch-0", 30.0)
    with pytest.raises(SystemExit, match="fixmatsch, which is not in METHODS"):
        results.read("fair")
