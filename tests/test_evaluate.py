"""evaluate.py: scores against hand-made counts, and checkpoints that must not be trusted."""

import pytest
import torch

import evaluate as E
from data import InputError, open_dataset

CLASSES = ("sky", "road", "car")


def test_confusion_counts_pairs_and_leaves_255_out():
    label = torch.tensor([[0, 0, 1], [255, 2, 1]])
    prediction = torch.tensor([[0, 1, 1], [2, 2, 0]])
    assert E.confusion_matrix(prediction, label, 3).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert E.confusion_matrix(prediction, label.to(torch.uint8), 3).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_scores_match_a_hand_made_confusion_matrix():
    result = E.scores(torch.tensor([[6, 2, 0], [1, 3, 0], [0, 4, 4]]), torch.eye(4), CLASSES)
    assert result["iou"] == pytest.approx({"sky": 100 * 6 / 9, "road": 100 * 3 / 10, "car": 100 * 4 / 8})
    assert result["miou"] == pytest.approx((100 * 6 / 9 + 30 + 50) / 3)
    assert result["pixel_accuracy"] == pytest.approx(100 * 13 / 20)


def test_a_class_in_neither_truth_nor_prediction_counts_nowhere():
    result = E.scores(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), torch.eye(4), CLASSES)
    assert result["iou"]["car"] is None and result["miou"] == pytest.approx(100 * (3 / 4 + 4 / 5) / 2)
    assert "car" in E.table(result) and "absent" in E.table(result)
    wrongly_predicted = E.scores(torch.tensor([[3, 1, 1], [0, 4, 0], [0, 0, 0]]), torch.eye(4), CLASSES)
    assert wrongly_predicted["iou"]["car"] == 0


class Oracle(torch.nn.Module):
    """Predicts class 0 everywhere."""

    def forward(self, x):
        return torch.cat([torch.ones_like(x[:, :1]), torch.zeros(len(x), 6, *x.shape[2:])], 1)


def test_background_alone_scores_its_share_on_shapes():
    data = open_dataset("shapes", "", 3)
    result = E.evaluate(Oracle(), data, data.val[:20], torch.device("cpu"))
    assert result["iou"]["background"] == pytest.approx(result["pixel_accuracy"])
    assert result["miou"] == pytest.approx(result["iou"]["background"] / 7)


def test_heat_grows_from_black_to_white():
    assert E.heat(torch.tensor([[0.0, 1 / 3, 2 / 3, 1.0]]))[:, 0].T.tolist() == [
        [0, 0, 0],
        [255, 0, 0],
        [255, 255, 0],
        [255] * 3,
    ]


def test_an_overlay_shows_the_label_s_colors_and_dims_the_rest():
    image = torch.full((3, 2, 2), 90, dtype=torch.uint8)
    tile = E.overlay(image, torch.tensor([[1, 1], [255, 255]], dtype=torch.uint8))
    assert tile[:, 1, 0].tolist() == [30] * 3 and tile[0, 0, 0] > 100 and tile[1, 0, 0] < 30
    assert torch.equal(E.overlay(image, torch.full((2, 2), 255)), image // 3)


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_bad_checkpoint_gets_one_sentence_and_runs_no_code(tmp_path, capsys):
    with pytest.raises(InputError, match="is not there; expected the last.pth"):
        E.load_checkpoint(tmp_path / "none.pth")
    for name, content in (("evil.pth", {"step": Evil()}), ("list.pth", [1]), ("other.pth", {"step": 1})):
        torch.save(content, tmp_path / name)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:100])
    for name, says in (
        ("evil", "could not be read"),
        ("cut", "could not be read"),
        ("list", "lacks args"),
        ("other", "lacks args"),
    ):
        with pytest.raises(InputError, match=says):
            E.load_checkpoint(tmp_path / f"{name}.pth")
    assert "must not run" not in capsys.readouterr().out


def test_weights_of_another_class_count_get_one_sentence():
    from model import DeepLabV3Plus

    weights = DeepLabV3Plus("resnet10", 7).state_dict()
    checkpoint = {"args": {"backbone": "resnet10", "output_stride": 16}, "classes": ["a"] * 5, "teacher": weights}
    with pytest.raises(InputError, match="do not fit a resnet10 with 5 classes.*7.*5"):
        E.load_model(checkpoint, "last.pth")
