"""The method of S4MC: which pixels of an unlabeled image get a pseudo-label, and which label.

    prob = teacher(image).softmax(1)                        # after softmax: it sums to 1 over the classes
    pseudo = pseudo_labels(prob, alpha=dpa_alpha(step, total_steps))
    total = cross_entropy(student(strong_view_of_image), pseudo.label, ignore_index=255, reduction="sum")
    loss = total / pseudo.keep.sum().clamp(min=1)           # Eq. 3; several processes: see train.cross_entropy

This file needs only PyTorch. It can be copied into another project as it is.

    paper               here             shape       values
    p_c(x_jk)           prob             (B,C,H,W)   0..1, sums to 1 over C
    p_c(x_lm)           q                like prob   the same, of a neighbor
    p_c(x_jk, x_lm)     joint            like prob   0..1, Eqs. 14-16
    p~_c(x_jk)          refined          (B,C,H,W)   0..1; the probability of a union, need not sum to 1 over C
    beta_lm             beta             number      0..1, Eq. 10
    kappa               confidence       (B,H,W)     margin 0..1, max 0..1, entropy at most 0; higher is surer
    gamma_t             threshold        0-d         like confidence
    alpha_t, alpha_0    alpha, alpha0    number      0..1, gamma_t is this quantile of the raw confidences
    y^_jk               label            (B,H,W)     0..C-1, or 255: the pixel is ignored

An example to follow by hand, printed with three digits. Four pixels a, b, c and d lie in a row, with three classes:

>>> prob = torch.tensor([[.70, .20, .10], [.45, .30, .25], [.50, .40, .10], [.20, .70, .10]]).T.view(1, 3, 1, 4)
>>> confidence(prob).flatten()                                       # Eq. 5, raw
tensor([0.500, 0.150, 0.100, 0.500])
>>> dpa_threshold(confidence(prob), alpha=0.4)                       # the one at index floor(0.4 * (4 - 1)) = 1, sorted
tensor(0.150)
>>> refine(prob)[0, :, 0].T                                          # Eq. 10, beta = 0.607 beside the pixel
tensor([[0.782, 0.346, 0.236],
        [0.684, 0.470, 0.295],
        [0.636, 0.655, 0.236],
        [0.443, 0.773, 0.155]])
>>> confidence(refine(prob)).flatten()                               # Eq. 5, refined
tensor([0.436, 0.214, 0.018, 0.330])
>>> pseudo_labels(prob, alpha=0.4).label.flatten()                   # Eq. 4; without refinement only a and d
tensor([  0,   0, 255,   1])
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

IGNORE = 255


def confidence(prob, kind="margin"):
    """Eqs. 5, 11 and 12: return how sure each pixel is of its class; prob (B,C,H,W) -> (B,H,W).

    margin:   max_c p_c - max2_c p_c      Eq. 5 (= 13), 0..1
    max:      max_c p_c                   Eq. 11, 0..1
    entropy:  sum_c p_c log p_c           Eq. 12, the negative entropy, -log C..0; refined, it may be below -log C
    Refined probabilities go into the same formulas, Sec. 3.2.2. Raises ValueError for another kind.
    """
    return confidence_and_label(prob, kind)[0]


def confidence_and_label(prob, kind):
    """Return the confidence and the class of the largest probability, (B,H,W) each."""
    if prob.dim() != 4 or prob.shape[1] < 2:
        raise ValueError(
            f"prob has shape {tuple(prob.shape)}; expected (batch, classes, height, width) with two classes or more; "
            "for a sigmoid use torch.cat([1 - p, p], 1)"
        )
    if kind == "margin" and not prob.is_cuda:
        return _margin_and_label_on_cpu(prob)
    first, label = prob.max(1)
    if kind == "margin":
        second = prob.scatter(1, label[:, None], 0).amax(1)
        return first - second, label
    if kind == "max":
        return first, label
    if kind == "entropy":
        return torch.xlogy(prob, prob).sum(1), label
    raise ValueError(f"confidence {kind!r} is unknown; expected 'margin', 'max' or 'entropy'")


def _margin_and_label_on_cpu(prob):
    """The same by a running top-2 over the classes. On a CPU it is faster for large inputs."""
    first = torch.zeros_like(prob[:, 0])
    second = torch.zeros_like(first)
    label = torch.zeros_like(first)
    for c, p in enumerate(prob.unbind(1)):
        label = torch.where(p > first, c, label)
        second = torch.maximum(second, torch.minimum(first, p))
        first = torch.maximum(first, p)
    return first - second, label.long()


def offsets(neighborhood, dilation=1, distance_weight=True):
    """Return the neighbors of a pixel, [(dy, dx, beta), ...], with beta of Eq. 10.

    beta = exp(-(|dy| + |dx|) / 2), before dilation. Without `distance_weight` it is 1, as in Eqs. 7-9.
    neighborhood: 3, 5 or 7 for the N x N square without its center; "cross" for up, down, left and right.
    dilation: distance of neighbors in pixels [ours]. Raises ValueError for an unknown neighborhood or dilation.
    """
    # Paper: beta is introduced for the larger neighborhoods. Authors' code: 0.607 for each neighbor of their cross.
    # Here: Eq. 10 for every neighborhood, 0.607 beside the pixel and 0.368 on the diagonal.
    if neighborhood not in (3, 5, 7, "cross") or dilation < 1:
        raise ValueError(f"neighborhood {neighborhood!r}, dilation {dilation}; expected 3, 5, 7 or 'cross', 1 or more")
    reach = 1 if neighborhood == "cross" else neighborhood // 2
    grid = []
    for dy, dx in itertools.product(range(-reach, reach + 1), repeat=2):
        distance = abs(dy) + abs(dx)
        if distance == 0 or (neighborhood == "cross" and distance > 1):
            continue
        beta = math.exp(-distance / 2) if distance_weight else 1.0
        grid.append((dilation * dy, dilation * dx, beta))
    return grid


def _neighbors(x, grid, value=0):
    """Return each pixel's neighbor at each offset: shifted views of x (...,H,W), `value` outside the image."""
    reach = max(dy for dy, _, _ in grid)
    height, width = x.shape[-2:]
    around = F.pad(x, [reach] * 4, value=value)
    return [around[..., reach + dy : reach + dy + height, reach + dx : reach + dx + width] for dy, dx, _ in grid]


def refine(
    prob, neighborhood=3, neighbors=1, select="max", prior=None, distance_weight=True, dilation=1, generator=None
):
    """Eqs. 7-10, Sec. 3.2.1: return the probability that the pixel or its best neighbor is of class c, for each c.

    refined_c = p_c + beta * (q_c - joint_c)      q is the neighbor's; joint_c = p_c * q_c (Eq. 14)

    prob (B,C,H,W) -> (B,C,H,W), 0..1. A neighbor outside the image does not exist. Neither does one whose
    probabilities are all 0, which marks padding.
    neighborhood, distance_weight, dilation: see `offsets`.
    select: "max" takes the neighbor with the largest union, class by class (Eq. 9); "min" the smallest (Table 4a);
        "random" takes one existing position per pixel, the same for all classes (Table 4a).
    neighbors: how many. The best is united first, then the best of the rest, and so on (end of Sec. 3.2.1).
    prior (C,): joint_c = max(p_c * q_c, p_c * prior_c), Eqs. 15-16; see `neighbor_agreement`.
    generator: for "random", on prob's device. Raises ValueError for unknown options.
    """
    if prob.dim() != 4:
        raise ValueError(f"prob has shape {tuple(prob.shape)}; expected (batch, classes, height, width)")
    if select not in ("max", "min", "random") or neighbors < 1:
        raise ValueError(f"{neighbors} neighbors by {select!r}; expected 1 or more, by 'max', 'min' or 'random'")
    if prior is not None and prior.shape != prob.shape[1:2]:
        raise ValueError(f"prior has shape {tuple(prior.shape)}; expected one number per class, ({prob.shape[1]},)")
    grid = offsets(neighborhood, dilation, distance_weight)
    if select != "max" or neighbors > 1 or prior is not None:
        return _refine_with_options(prob, grid, neighbors, select, prior, generator)
    size = prob.shape[1] if prob.is_cuda else 3  # on a CPU three classes at a time, which fit its cache
    return torch.cat([_refine_with_best_neighbor(p, grid) for p in prob.split(size, 1)], 1)


def _refine_with_best_neighbor(p, grid):
    """The default options. A neighbor that does not exist has q = 0; its union is p and changes nothing."""
    best = torch.zeros_like(p)
    for q, (_, _, beta) in zip(_neighbors(p, grid), grid):
        # Eq. 14: joint = p q. Eq. 10: union = p + beta (q - joint) = p + (1 - p) beta q.
        best = torch.maximum(best, beta * q)  # Eq. 9: 1 - p is the same for all neighbors, so the largest beta q wins
    return torch.addcmul(p, 1 - p, best)  # p + (1 - p) beta q


def _refine_with_options(prob, grid, neighbors, select, prior, generator):
    """Several, random or worst neighbors (Table 4a) and the prior (Eq. 16); slower; keeps all unions in memory."""
    q = torch.stack(_neighbors(prob, grid))  # (N,B,C,H,W)
    beta = q.new_tensor([beta for _, _, beta in grid]).view(-1, 1, 1, 1, 1)
    free = (q.sum(2, keepdim=True) > 0).expand_as(q)  # exists and is not yet taken
    order = torch.rand(free[:, :, :1].shape, generator=generator, device=prob.device)
    refined = prob
    for _ in range(min(neighbors, len(grid))):
        joint = refined * q  # Eq. 14
        if prior is not None:
            joint = torch.maximum(joint, refined * prior.to(q).view(-1, 1, 1))  # Eq. 16
        union = refined + beta * (q - joint)  # Eq. 10
        score = {"max": union, "min": -union, "random": order.expand_as(q)}[select]  # Eq. 9 takes the largest
        best, which = score.masked_fill(~free, -torch.inf).max(0, keepdim=True)
        refined = torch.where(best > -torch.inf, union.gather(0, which), refined)[0]
        free = free.scatter(0, which, False)
    return refined


def neighbor_agreement(labels, num_classes, neighborhood=3):
    """Eq. 15 for each class: return P(a neighbor is of class c | the pixel is of class c), counted over label maps.

    labels (B,H,W): integers 0..num_classes-1, or 255. A pixel that is 255 has no class; a neighbor that is 255
    disagrees. Returns (num_classes,), 0..1; 0 for a class that never occurs. Raises ValueError for any other label.
    """
    # In PASCAL 255 lies between the classes. Without it almost all neighbors would agree.
    if ((labels != IGNORE) & ((labels < 0) | (labels >= num_classes))).any():
        raise ValueError(f"labels hold values outside 0..{num_classes - 1} and 255")
    labels = labels.long()
    pairs = agreeing = 0
    for neighbor in _neighbors(labels, offsets(neighborhood), value=-1):
        pixel = labels.masked_fill(neighbor == -1, IGNORE)  # outside the image there is no pair
        pairs += torch.bincount(pixel.flatten(), minlength=IGNORE + 1)[:num_classes]
        agreeing += torch.bincount(pixel[pixel == neighbor], minlength=IGNORE + 1)[:num_classes]
    return agreeing / pairs.clamp(min=1)


def dpa_alpha(step, total_steps, alpha0=0.4):
    """Eq. 6: return alpha_t = alpha0 * (1 - t / iterations). Default alpha0: Sec. 3.2.2 and Table 4b."""
    # Paper: t counts iterations. Authors' code: epochs. Here: iterations.
    return alpha0 * (1 - step / total_steps)


def dpa_threshold(conf, alpha, valid=None, everywhere=True):
    """Sec. 3.1.2: return gamma_t, the alpha-quantile of the raw confidences of the whole batch.

    conf: any shape, any range, of the same size in every process; alpha: 0..1; valid: bool like conf, True on pixels
    that count (default: all); everywhere=False leaves out the other processes.
    Returns a 0-d tensor on conf's device: of the n valid pixels, the one at place floor(alpha * (n - 1)) when sorted.
    It equals torch.quantile(..., interpolation="lower"), and is +inf if n is 0.
    Raises ValueError if alpha is outside 0..1.
    """
    # Paper: "all pixels of all images in the batch". Authors' code: of one GPU, on the host. Here: of all processes.
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a share from 0 to 1")
    if valid is not None:
        conf = conf.masked_fill(~valid, torch.inf)
    values = conf.float().flatten()
    if everywhere and dist.is_available() and dist.is_initialized():
        gathered = values.new_empty(dist.get_world_size() * len(values))
        dist.all_gather_into_tensor(gathered, values)
        values = gathered
    if not values.numel():
        return values.new_tensor(torch.inf)
    last = ((values < torch.inf).sum() - 1).clamp(min=0)
    place = (last.double() * alpha).long()
    if values.is_cuda:  # kthvalue would wait for the GPU
        return values.sort().values.gather(0, place[None])[0]
    return values.kthvalue(place.item() + 1).values


class PseudoLabels(NamedTuple):
    """What `pseudo_labels` returns."""

    label: torch.Tensor  # (B,H,W) long, 255 = ignore
    keep: torch.Tensor  # (B,H,W) bool, True on pixels that are trained on
    confidence: torch.Tensor  # (B,H,W), after refinement
    threshold: torch.Tensor  # 0-d


@torch.no_grad()
def pseudo_labels(prob, alpha, *, kind="margin", valid=None, threshold=None, floor=0.0, refinement=True, **options):
    """Eq. 4 with Sec. 3.2.2: the threshold comes from the raw probabilities, the decision from the refined ones.

    label = argmax_c refined_c if confidence(refined) > threshold, else 255

    prob (B,C,H,W): the teacher's, after softmax
    alpha: 0..1, see `dpa_alpha`; kind: see `confidence`
    valid (B,H,W) bool: False on padding
    threshold: a fixed one in place of DPA's (FixMatch: 0.95, with kind="max"); alpha is then unused
    floor: DPA's threshold is never below it [ours]
    refinement: False leaves out Eqs. 7-10; options: those of `refine`
    """
    # Paper: the largest union in Sec. 1, the largest p in Eq. 4. Authors' code: the raw argmax. Here: Sec. 1.
    conf, label = confidence_and_label(prob, kind)
    if threshold is None:
        threshold = dpa_threshold(conf, alpha, valid)
        if floor:
            threshold = threshold.clamp(min=floor)
    if refinement:
        if valid is not None:
            prob = prob.masked_fill(~valid[:, None], 0)  # padding is not a neighbor
        conf, label = confidence_and_label(refine(prob, **options), kind)
    keep = conf > threshold
    if valid is not None:
        keep = keep & valid
    label = label.masked_fill(~keep, IGNORE)
    if not torch.is_tensor(threshold):
        threshold = conf.new_full((), threshold)
    return PseudoLabels(label, keep, conf, threshold)
