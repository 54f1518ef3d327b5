"""S4MC itself: which pixels of an unlabeled image get a pseudo-label, and which one.

    pseudo = pseudo_labels(teacher(image).softmax(1), alpha=dpa_alpha(step, total_steps))
    total = cross_entropy(student(strong_view_of_image), pseudo.label, ignore_index=255, reduction="sum")
    loss = total / pseudo.keep.sum().clamp(min=1)           # Eq. 3; of several processes, add up the pixels of all

This file needs only PyTorch; it can be copied into another project as it is.

    paper                       here              shape       values
    p_c(x_jk)                   prob              (B,C,H,W)   0..1, sums to 1 over C
    p_c(x_lm)                   q                 like prob   the same of a neighbor
    p_c(x_jk, x_lm)             joint             like prob   0..1, Eqs. 14-16
    p~_c(x_jk)                  refined           (B,C,H,W)   0..1, probability of a union: need not sum to 1 over C
    beta_lm                     beta              number      0..1, Eq. 10
    kappa                       confidence        (B,H,W)     margin 0..1, max 0..1, entropy -log C..0; higher is surer
    gamma_t                     threshold         0-d         like kappa
    alpha_t, alpha_0            alpha, alpha0     number      0..1, share of the raw pixels at or below the threshold
    y^_jk                       label             (B,H,W)     0..C-1, or 255 where the pixel is ignored
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

IGNORE = 255


def confidence(prob, kind="margin"):
    """Eq. 5 (= 13), 11 or 12: how sure each pixel is of its class; prob (B,C,H,W) -> (B,H,W).

    margin:   max_c p_c - max2_c p_c      Eq. 5, 0..1
    max:      max_c p_c                   Eq. 11, 0..1
    entropy:  sum_c p_c log p_c           Eq. 12, the negative entropy, -log C..0; refined, it may be lower
    Refined probabilities are put into the same formulas, Sec. 3.2.2. Raises ValueError for another kind.
    """
    return _ranked(prob, kind)[0]


def _ranked(prob, kind):
    """(confidence, class of the largest probability), (B,H,W) each."""
    if kind == "margin" and not prob.is_cuda:  # a running top-2: a kernel per class, but half a CPU's time
        first = second = label = torch.zeros_like(prob[:, 0])
        for c, p in enumerate(prob.unbind(1)):
            label, second, first = torch.where(p > first, c, label), second.maximum(first.minimum(p)), first.maximum(p)
        return first - second, label.long()
    first, label = prob.max(1)
    if kind == "margin":
        return first - prob.scatter(1, label[:, None], 0).amax(1), label
    if kind not in ("max", "entropy"):
        raise ValueError(f"confidence {kind!r} is unknown; expected 'margin', 'max' or 'entropy'")
    return first if kind == "max" else torch.xlogy(prob, prob).sum(1), label


def offsets(neighborhood, dilation=1, distance_weight=True):
    """The neighbors of a pixel, [(dy, dx, beta), ...], with beta of Eq. 10.

    beta = exp(-(|dy| + |dx|) / 2), counted in steps of the grid; 1 without `distance_weight`, which is Eqs. 7-9.
    neighborhood: 3, 5 or 7 for the N x N square without its center, "cross" for up, down, left and right.
    Raises ValueError for another neighborhood or a dilation below 1.
    """
    # Paper: beta is introduced for the larger neighborhoods. Authors' code: 0.607 for each neighbor of their cross.
    # Here: Eq. 10 for every neighborhood; 0.607 beside the pixel, 0.368 on the diagonal.
    if neighborhood not in (3, 5, 7, "cross") or dilation < 1:
        raise ValueError(f"neighborhood {neighborhood!r}, dilation {dilation}; expected 3, 5, 7 or 'cross', 1 or more")
    reach = 1 if neighborhood == "cross" else neighborhood // 2
    square = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1) if dy or dx]
    grid = [(dy, dx) for dy, dx in square if neighborhood != "cross" or dy * dx == 0]
    beta = {(dy, dx): math.exp(-(abs(dy) + abs(dx)) / 2) if distance_weight else 1.0 for dy, dx in grid}
    return [(dilation * dy, dilation * dx, beta[dy, dx]) for dy, dx in grid]


def _neighbors(x, grid, value=0):
    """Each pixel's neighbor at each offset of the grid: shifted views of x (...,H,W), `value` outside the image."""
    reach, (height, width) = max(dy for dy, *_ in grid), x.shape[-2:]
    around = F.pad(x, [reach] * 4, value=value)
    return [around[..., reach + dy : reach + dy + height, reach + dx : reach + dx + width] for dy, dx, _ in grid]


def refine(
    prob, neighborhood=3, neighbors=1, select="max", prior=None, distance_weight=True, dilation=1, generator=None
):
    """Eqs. 7-10, Sec. 3.2.1: the probability of each class that the pixel or its best neighbor belongs to it.

    refined_c = p_c + beta * (q_c - joint_c)      q the neighbor's probabilities, joint_c = p_c * q_c (Eq. 14)

    prob (B,C,H,W) -> (B,C,H,W), each value 0..1. A neighbor outside the image, or with all probabilities 0, which marks
    padding, does not exist.
    neighborhood, distance_weight, dilation: see `offsets`; neighbors are `dilation` pixels apart [ours].
    select: "max" takes, class by class, the neighbor with the largest union (Eq. 9), "min" the one with the smallest,
        "random" one position per pixel among those that exist, the same for all classes (Table 4a).
    neighbors: how many to unite, one after another, each among those not yet taken (end of Sec. 3.2.1).
    prior (C,): joint_c = max(p_c * q_c, p_c * prior_c), Eqs. 15-16; see `neighbor_agreement`.
    generator: for "random", on prob's device. Raises ValueError for options it does not know.
    """
    if prob.dim() != 4:
        raise ValueError(f"prob has shape {tuple(prob.shape)}; expected (batch, classes, height, width)")
    if select not in ("max", "min", "random") or neighbors < 1:
        raise ValueError(f"{neighbors} neighbors by {select!r}; expected 1 or more, by 'max', 'min' or 'random'")
    if prior is not None and prior.shape != prob.shape[1:2]:
        raise ValueError(f"prior has shape {tuple(prior.shape)}; expected one number per class, ({prob.shape[1]},)")
    grid, sign, exists = offsets(neighborhood, dilation, distance_weight), -1 if select == "min" else 1, None
    if select != "max" or neighbors > 1 or prior is not None:  # else what does not exist is 0 and never the best
        exists = torch.stack(_neighbors(prob.sum(1, keepdim=True) > 0, grid))  # (len(grid),B,1,H,W)
    if select == "random":
        score = torch.rand(exists.shape, generator=generator, device=prob.device)
        order = score.masked_fill(~exists, -1).argsort(0, descending=True)  # each pixel's neighbors, shuffled

    refined, chunk = [], prob.shape[1] if prob.is_cuda else 3  # three classes stay in a CPU's cache
    for first in range(0, prob.shape[1], chunk):
        classes, taken = slice(first, first + chunk), []
        p, around = prob[:, classes], _neighbors(prob[:, classes], grid)
        for turn in range(min(neighbors, len(grid))):
            best, which = torch.full_like(p, 0 if exists is None else -torch.inf), -1
            for n, ((*_, beta), q) in enumerate(zip(grid, around)):
                gain = q * (sign * beta)  # Eqs. 10, 14: p + beta (q - p q) = p + (1 - p) beta q; 1 - p comes last
                if prior is not None:  # Eq. 16
                    gain = (q - p * q.maximum(prior[classes].to(q).view(-1, 1, 1))) * (sign * beta)
                if exists is not None:
                    free = exists[n] & (order[turn] == n) if select == "random" else exists[n]
                    for earlier in taken:
                        free = free & (earlier != n)
                    gain = gain.where(free, -torch.inf)
                    which = torch.where(gain > best, n, which)
                best = torch.maximum(best, gain)  # Eq. 9
            taken.append(which)
            best = best if exists is None else best.nan_to_num(neginf=0)  # no neighbor: no gain
            p = torch.addcmul(p, best, 1 - p, value=sign) if prior is None else p + sign * best
        refined.append(p)
    return torch.cat(refined, 1)


def neighbor_agreement(labels, num_classes, neighborhood=3):
    """Eq. 15, class by class: P(a neighbor is of class c | the pixel is of class c), counted over label maps.

    labels (B,H,W), integers 0..num_classes-1, or 255: such a pixel has no class, such a neighbor disagrees.
    Returns (num_classes,), 0..1; 0 for a class that never occurs. Raises ValueError for any other label.
    """
    # Where 255 separates the classes, as in PASCAL, pairs of labeled pixels alone would always agree.
    if ((labels != IGNORE) & ((labels < 0) | (labels >= num_classes))).any():
        raise ValueError(f"labels hold values outside 0..{num_classes - 1} and 255")
    labels, pairs, agreeing = labels.long(), 0, 0
    for neighbor in _neighbors(labels, offsets(neighborhood), value=-1):
        pixel = labels.masked_fill(neighbor == -1, IGNORE)  # outside the image there is no pair
        pairs += torch.bincount(pixel.flatten(), minlength=IGNORE + 1)[:num_classes]
        agreeing += torch.bincount(pixel[pixel == neighbor], minlength=IGNORE + 1)[:num_classes]
    return agreeing / pairs.clamp(min=1)


def dpa_alpha(step, total_steps, alpha0=0.4):
    """Eq. 6: alpha_t = alpha0 * (1 - t / iterations). Default alpha0: Sec. 3.2.2 and Table 4b."""
    # Paper: t counts iterations. Authors' code: epochs. Here: iterations.
    return alpha0 * (1 - step / total_steps)


@torch.compiler.disable
def dpa_threshold(conf, alpha, valid=None):
    """gamma_t of Sec. 3.1.2: the alpha-quantile of the raw confidences of the whole batch.

    conf: any shape, the same in every process, any range; alpha 0..1; valid: bool like conf, True on pixels that count
    (default: all).
    Returns a 0-d tensor on conf's device: the value of rank floor(alpha * (n - 1)) among the n valid pixels of all
    processes, exact (torch.quantile's "lower"); +inf if there is none. Raises ValueError for another alpha.
    """
    # Paper: "all pixels of all images in the batch". Authors' code: each GPU's, on the host. Here: all processes'.
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a share from 0 to 1")
    values = (conf if valid is None else conf.masked_fill(~valid, torch.inf)).float().flatten()
    if dist.is_available() and dist.is_initialized():
        everywhere = values.new_empty(dist.get_world_size() * len(values))
        dist.all_gather_into_tensor(everywhere, values)
        values = everywhere
    if not values.numel():
        return values.new_tensor(torch.inf)
    rank = (((values < torch.inf).sum() - 1).clamp(min=0).double() * alpha).long()  # kthvalue would wait for a GPU
    return values.sort().values.gather(0, rank[None])[0] if values.is_cuda else values.kthvalue(rank.item() + 1).values


class PseudoLabels(NamedTuple):
    """What `pseudo_labels` returns."""
    label: torch.Tensor  # (B,H,W) long, 255 = ignore
    keep: torch.Tensor  # (B,H,W) bool, True on pixels that are trained on
    confidence: torch.Tensor  # (B,H,W), after refinement
    threshold: torch.Tensor  # 0-d


@torch.no_grad()
def pseudo_labels(prob, alpha, *, kind="margin", valid=None, threshold=None, floor=0.0, refinement=True, **options):
    """Eq. 4 with Sec. 3.2.2: the threshold comes from the raw probabilities, the decision from the refined ones.

    label = argmax_c refined_c where confidence(refined) > threshold, else 255
    prob (B,C,H,W), the teacher's; alpha 0..1, see `dpa_alpha`; kind: see `confidence`; valid (B,H,W) bool, False on
    padding; threshold: a fixed one in place of DPA (FixMatch: 0.95), alpha is not used then; floor: DPA's threshold is
    never below it [ours], 0: no floor; refinement=False leaves out Eqs. 7-10; options: those of `refine`.
    """
    # Paper, Sec. 1: the class whose union beats every other's. Authors' code: the raw argmax. Here: the paper.
    conf, label = _ranked(prob, kind)
    if threshold is None:
        threshold = dpa_threshold(conf, alpha, valid).clamp(min=floor or -torch.inf)
    if refinement:
        if valid is not None:  # padding is no neighbor: a union with 0 changes nothing
            prob = prob.masked_fill(~valid[:, None], 0)
        conf, label = _ranked(refine(prob, **options), kind)
    keep = conf > threshold if valid is None else (conf > threshold) & valid
    label = label.masked_fill(~keep, IGNORE)
    return PseudoLabels(label, keep, conf, threshold if torch.is_tensor(threshold) else conf.new_full((), threshold))
