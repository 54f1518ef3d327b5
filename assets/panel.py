"""Make assets/panel.png: what refinement changes at the boundary of an object, from a checkpoint in mid-run.

    python assets/panel.py CHECKPOINT
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as VF
from torchvision.utils import draw_bounding_boxes, make_grid

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from data import IGNORE, whole_image  # noqa: E402
from evaluate import CHANGES, heat, label_options, open_dataset_of, overlay, panel_items, predict  # noqa: E402
from model import load_checkpoint, load_network  # noqa: E402
from refine import dpa_alpha, pseudo_labels  # noqa: E402

ROWS, SIDE, TILE = 3, 32, 118  # images; side of the enlarged square, and of a tile of the figure, pixels
COLUMNS = (
    "image", "enlarged", "ground truth", "raw margin", "refined margin", "raw label", "refined label", "change",
)  # fmt: skip


def row(network, data, item, run, alpha):
    """Return an image's tiles (3,TILE,TILE) around the square where refinement changes most, and a caption."""
    image, truth = whole_image(data, item)
    options = label_options(run)
    prob = predict(network, image)
    raw = pseudo_labels(prob, alpha, **options | {"refinement": False})
    refined = pseudo_labels(prob, alpha, **options)
    change = torch.where(raw.label == IGNORE, 0, torch.where(refined.label == IGNORE, 1, 2))
    change = change.masked_fill(raw.label == refined.label, IGNORE)
    changed = F.avg_pool2d((change != IGNORE).float(), SIDE, 1)[0]
    top, left = divmod(changed.argmax().item(), changed.shape[-1])
    box = torch.tensor([[left, top, left + SIDE, top + SIDE]])
    classes = len(data.classes)
    pictures = [
        image[0], overlay(image[0], truth[0]), heat(raw.confidence[0], run["confidence"], classes),
        heat(refined.confidence[0], run["confidence"], classes), overlay(image[0], raw.label[0]),
        overlay(image[0], refined.label[0]), overlay(image[0], change[0], opacity=1, colors=CHANGES),
    ]  # fmt: skip
    tiles = [VF.resize(draw_bounding_boxes(image[0], box, colors="white"), [TILE, TILE])]
    for picture in pictures:
        square = picture[:, top : top + SIDE, left : left + SIDE]
        tiles.append(VF.resize(square, [TILE, TILE], VF.InterpolationMode.NEAREST))
    kept_raw, kept = (labels.keep.float().mean() for labels in (raw, refined))
    kept_both = f"kept {kept_raw:.1%} raw, {kept:.1%} refined"
    return tiles, f"alpha {alpha:.2f}, threshold {raw.threshold:.3f}, {kept_both} (labels gained: green, lost: red)"


def main(path):
    """Write the figure of a checkpoint."""
    checkpoint = load_checkpoint(path)
    run = checkpoint["args"]
    network = load_network(checkpoint)
    data = open_dataset_of(checkpoint, None, ("unlabeled",))
    alpha = dpa_alpha(checkpoint["step"], run["iters"], run["alpha0"])
    width = len(COLUMNS) * (TILE + 4) + 4
    parts = []
    for item in panel_items(data, ROWS):
        tiles, caption = row(network, data, item, run, alpha)
        text = Image.new("RGB", (width, 36), "white")
        draw = ImageDraw.Draw(text)
        draw.text((4, 1), f"step {checkpoint['step']} of {run['iters']}, {caption}", "black", font_size=14)
        for number, title in enumerate(COLUMNS):
            draw.text((4 + number * (TILE + 4), 20), title, "black", font_size=13)
        parts += [VF.pil_to_tensor(text), make_grid(tiles, nrow=len(tiles), padding=4, pad_value=255)]
    VF.to_pil_image(torch.cat(parts, 1)).save(ASSETS / "panel.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
