"""S4MC itself: which pixels of an unlabeled image receive a pseudo-label, and which label that is.

    pseudo = pseudo_labels(teacher(image).softmax(1), alpha=dpa_alpha(step, total_steps))
    loss = cross_entropy(student(strong_view_of_image), pseudo.label, ignore_index=255)

This file needs PyTorch and nothing else; it can be copied into another project as it is.

    paper                       here              shape       values
    p_c(x_jk)                   prob              (B,C,H,W)   0..1, sums to 1 over C
    p_c(x_jk, x_lm)             joint             like prob   0..1, Eqs. 14-16
    p~_c(x_jk)                  refined           (B,C,H,W)   0..1, a union's probability: need not sum to 1 over C
    beta_lm                     beta              number      0..1, Eq. 10
    kappa                       confidence        (B,H,W)     margin 0..1, max 0..1, entropy -log C..0; higher is surer
    gamma_t                     threshold         0-d         like kappa
    alpha_t, alpha_0            alpha, alpha0     number      0..1, the share of raw pixels below the threshold
    y^_jk                       label             (B,H,W)     0..C-1, or 255 where the pixel is ignored
    (image, not padding)        valid             (B,H,W)     bool
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

IGNORE = 255


def confidence(prob, kind="margin"):
    """Eq. 5 (= 13), 11 or 12: how sure each pixel is of its class.

    margin:   max_c p_c - max2_c p_c      Eq. 5, 0..1
    max:      max_c p_c                   Eq. 11, 0..1
    entropy:  sum_c p_c log p_c           Eq. 12, the negative entropy, -log C..0

    prob (B,C,H,W) -> (B,H,W). Refined probabilities are put into the same formulas, as in Sec. 3.2.2.
    Raises ValueError on another kind.
    """
    ranking = _Ranking.of_nothing(prob, labels=False)
    for c, p in enumerate(prob.unbind(1)):
        ranking = ranking.after(p, c, kind)
    return ranking.confidence(kind)


def offsets(neighborhood, dilation=1, distance_weight=True):
    """The neighbors of a pixel, [(dy, dx, beta), ...], with beta of Eq. 10.

    beta = exp(-(|dy| + |dx|) / 2), counted in steps of the grid; 1 without `distance_weight`, which is Eqs. 7-9.
    neighborhood: 3, 5 or 7 for the N x N square without its center, "cross" for up, down, left and right.
    Raises ValueError on another neighborhood or a dilation below 1.
    """
    # Paper: beta is introduced for the larger neighborhoods. Authors' code: 0.607 for every neighbor of their cross.
    # Here: Eq. 10 for all; 0.607 beside the pixel, 0.368 on the diagonal.
    if neighborhood not in (3, 5, 7, "cross"):
        raise ValueError(f"neighborhood {neighborhood!r} is unknown; expected 3, 5, 7 or 'cross'")
    if dilation < 1:
        raise ValueError(f"dilation {dilation} is too small; expected 1 or more pixels")
    reach = 1 if neighborhood == "cross" else neighborhood // 2
    steps = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1) if (dy, dx) != (0, 0)]
    if neighborhood == "cross":
        steps = [(dy, dx) for dy, dx in steps if dy == 0 or dx == 0]
    return [
        (dilation * dy, dilation * dx, math.exp(-(abs(dy) + abs(dx)) / 2) if distance_weight else 1.0)
        for dy, dx in steps
    ]


def _pairs(height, width, dy, dx):
    """Two indices: the pixels whose neighbor (dy, dx) lies inside the image, and those neighbors; None if there are none."""
    if abs(dy) >= height or abs(dx) >= width:
        return None
    here = (..., slice(max(-dy, 0), height - max(dy, 0)), slice(max(-dx, 0), width - max(dx, 0)))
    there = (..., slice(max(dy, 0), height - max(-dy, 0)), slice(max(dx, 0), width - max(-dx, 0)))
    return here, there


def refine(
    prob, neighborhood=3, neighbors=1, select="max", prior=None, distance_weight=True, dilation=1, generator=None
):
    """Eqs. 7-10, Sec. 3.2.1: each class's probability that the pixel or its best neighbor belongs to the class.

    refined_c = p_c + beta * (q_c - joint_c)      q the neighbor's probabilities, joint_c = p_c * q_c (Eq. 14)

    prob (B,C,H,W) -> (B,C,H,W), each value 0..1. A neighbor outside the image does not exist.
    neighborhood, distance_weight, dilation: see `offsets`; dilation d asks the neighbors d pixels away [ours].
    select: "max" takes, class by class, the neighbor with the largest union (Eq. 9), "min" with the smallest;
        "random" draws one position per pixel among those inside the image, the same for all classes (Table 4a).
    neighbors: how many to unite, one after another, each among those not yet taken (end of Sec. 3.2.1).
    prior (C,): joint_c = max(p_c * q_c, p_c * prior_c), Eqs. 15-16; see `neighbor_agreement`.
    generator: for "random", on prob's device. Raises ValueError on options it does not know.
    """
    plan = _plan(prob, neighborhood, neighbors, select, prior, distance_weight, dilation, generator)
    return torch.stack([_united(p, floor, plan) for p, floor in zip(prob.unbind(1), plan.floors)], 1)


class _Plan(NamedTuple):
    """The options of `refine`, looked at and prepared for what is done class by class."""

    grid: list  # of `offsets`; empty where nothing is refined
    neighbors: int
    select: str
    draw: torch.Tensor | None  # (offsets,B,H,W), for "random"
    floors: list  # by class: its prior, or None


def _plan(
    prob, neighborhood=3, neighbors=1, select="max", prior=None, distance_weight=True, dilation=1, generator=None
):
    if select not in ("max", "min", "random"):
        raise ValueError(f"select {select!r} is unknown; expected 'max', 'min' or 'random'")
    if neighbors < 1:
        raise ValueError(f"neighbors {neighbors} is too small; expected 1 or more")
    if prob.dim() != 4:
        raise ValueError(f"prob has shape {tuple(prob.shape)}; expected (batch, classes, height, width)")
    batch, classes, height, width = prob.shape
    if prior is not None and prior.shape != (classes,):
        raise ValueError(f"prior has shape {tuple(prior.shape)}; expected one number per class, ({classes},)")
    grid, draw = offsets(neighborhood, dilation, distance_weight), None
    if select == "random":
        draw = torch.rand(len(grid), batch, height, width, generator=generator, device=prob.device)
    # Paper: Eq. 15 has no class in it. Authors' code: p_c times a per-class constant. Here: theirs, from this run's labels.
    floors = [None] * classes if prior is None else prior.to(prob).unbind()
    return _Plan(grid, neighbors, select, draw, list(floors))


def _united(p, floor, plan):
    """Eqs. 7-10 and 14-16 for one class: p (B,H,W) -> (B,H,W). floor: the class's prior, or None."""
    grid, neighbors, select, draw, _ = plan
    if not grid:
        return p
    if neighbors == 1 and draw is None and floor is None:
        return _united_with_one(p, grid, select)
    refined, taken = p, []
    for _ in range(min(neighbors, len(grid))):
        current, refined = refined, refined.clone()  # stays as it is where no neighbor is left
        best = torch.full_like(p, -torch.inf)
        winner = torch.full_like(p, -1, dtype=torch.int8)
        for i, (dy, dx, beta) in enumerate(grid):
            pairs = _pairs(*p.shape[1:], dy, dx)
            if pairs is None:
                continue
            here, there = pairs
            p_here, q = current[here], p[there]
            joint = p_here * (q if floor is None else torch.maximum(q, floor))  # Eq. 14, or 16
            union = p_here + beta * (q - joint)  # Eq. 10
            score = union if select == "max" else -union if select == "min" else draw[i][here]
            for earlier in taken:
                score = score.masked_fill(earlier[here] == i, -torch.inf)
            better = score > best[here]  # Eq. 9
            best[here] = torch.where(better, score, best[here])
            refined[here] = torch.where(better, union, refined[here])
            winner[here] = winner[here].masked_fill(better, i)
        taken.append(winner)
    return refined


def _united_with_one(p, grid, select):
    """The same with the one largest or smallest neighbor, under Eq. 14."""
    # Eq. 10 is p + beta (q - p q) = p + (1 - p) beta q; it grows with beta q, so that alone has to be compared.
    extreme, nothing = (torch.maximum, 0.0) if select == "max" else (torch.minimum, torch.inf)
    reach = max(dy for dy, _, _ in grid)
    around = F.pad(p, [reach] * 4, value=nothing)
    best = None
    for beta in sorted({beta for *_, beta in grid}):
        q = None
        for dy, dx in ((dy, dx) for dy, dx, weight in grid if weight == beta):
            neighbor = around[:, reach + dy :, reach + dx :][:, : p.shape[1], : p.shape[2]]
            q = neighbor if q is None else extreme(q, neighbor)
        best = beta * q if best is None else extreme(best, beta * q)
    if select == "min":
        best = best.masked_fill(best == nothing, 0)  # no neighbor lies inside the image
    return torch.addcmul(p, best, 1 - p)


def neighbor_agreement(labels, num_classes, neighborhood=3):
    """Eq. 15, class by class: P(a neighbor is of class c | the pixel is of class c), counted over label maps.

    labels (B,H,W), integers 0..num_classes-1 or 255, which counts nowhere. Returns (num_classes,), 0..1;
    0 for a class that never occurs, which leaves Eq. 14 as it is. Raises ValueError on any other label.
    """
    if ((labels != IGNORE) & ((labels < 0) | (labels >= num_classes))).any():
        raise ValueError(f"labels hold values outside 0..{num_classes - 1} and 255")
    labels = labels.long()
    pairs, agreeing = (torch.zeros(num_classes, dtype=torch.long, device=labels.device) for _ in range(2))
    for dy, dx, _ in offsets(neighborhood):
        windows = _pairs(*labels.shape[-2:], dy, dx)
        if windows is None:
            continue
        pixel, neighbor = labels[windows[0]], labels[windows[1]]
        counted = (pixel != IGNORE) & (neighbor != IGNORE)
        pairs += torch.bincount(pixel[counted], minlength=num_classes)
        agreeing += torch.bincount(pixel[counted & (pixel == neighbor)], minlength=num_classes)
    return agreeing / pairs.clamp(min=1)


def dpa_alpha(step, total_steps, alpha0=0.4):
    """Eq. 6: alpha_t = alpha0 * (1 - t / iterations). Default alpha0: Sec. 3.2.2 and Table 4b."""
    # Paper: t counts iterations. Authors' code: epochs. Here: iterations.
    return alpha0 * (1 - step / total_steps)


def dpa_threshold(conf, alpha, valid=None):
    """gamma_t of Sec. 3.1.2: the alpha-quantile of the raw confidences of the whole batch.

    conf: any shape, any range; alpha 0..1; valid: bool like conf, True on pixels that count (default: all).
    Returns a 0-d tensor on conf's device: the value of rank floor(alpha * (n - 1)) among the n valid pixels of all
    processes, exact to float32 (torch.quantile's "lower"); +inf if there is none. Raises ValueError on another alpha.
    """
    # Paper: "over all pixels of all images in the batch". Authors' code: each GPU for itself, on the CPU, with NumPy.
    # Here: the batch of all processes. Nothing is sorted: the answer's 32 bits are found 8 at a time from histograms,
    # which add up over processes, hold any number of pixels, and never wait for the device.
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected a share from 0 to 1")
    bits = conf.detach().float().reshape(-1, max(1, conf.shape[-1]) if conf.dim() else 1).view(torch.int32)
    bits = bits ^ ((bits >> 31) & (2**31 - 1))  # signed order of these bits = order of the floats
    count = torch.full((), bits.numel(), device=bits.device)
    if valid is not None:
        count = valid.sum()
        bits = bits.masked_fill(~valid.reshape(bits.shape), 2**31 - 1)  # behind everything that counts
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
    rank = ((count - 1).clamp(min=0).double() * alpha).long()
    one = torch.ones((), dtype=torch.int32, device=bits.device).expand_as(bits)
    value = torch.full((), -128, dtype=torch.int32, device=bits.device)  # the smallest that the first digits can be
    for shift in (24, 16, 8, 0):
        # 0: lies below the digits looked at now, 1..256: one of them, 257: above. A histogram per row, because one alone
        # would be written to from everywhere at once.
        below = value - 1
        digit = (bits >> shift).clamp_(below, below + 257).sub_(below).long()
        rows = torch.zeros(len(bits), 258, dtype=torch.int32, device=bits.device)
        histogram = rows.scatter_add_(1, digit, one).sum(0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(histogram)
        value = below + (histogram.cumsum(0) <= rank).sum().int()  # bins that lie wholly below the rank
        if shift:
            value = value << 8
    value = (value ^ ((value >> 31) & (2**31 - 1))).view(torch.float32)
    return torch.where(count > 0, value, torch.inf)


class PseudoLabels(NamedTuple):
    """What `pseudo_labels` returns."""

    label: torch.Tensor  # (B,H,W) long, 255 = ignore
    keep: torch.Tensor  # (B,H,W) bool, True on pixels that are trained on
    confidence: torch.Tensor  # (B,H,W), after refinement
    threshold: torch.Tensor  # 0-d


CLASSES_AT_ONCE = 4  # of a compiled kernel; more compile longer, fewer write more


class _Ranking(NamedTuple):
    """What is remembered of the classes seen so far, (B,H,W) each, so that never all of them need to exist at once."""

    # topk, argmax and max over the strided class dimension are many times slower.
    first: torch.Tensor  # the largest probability
    second: torch.Tensor  # the second largest
    entropy: torch.Tensor  # negative
    label: torch.Tensor | None  # the class of the first, float, which vectorizes better; None where nobody asks

    @classmethod
    def of_nothing(cls, prob, labels):
        zeros = torch.zeros_like(prob[:, 0])
        return cls(zeros, zeros, zeros, zeros if labels else None)

    def after(self, p, c, kind):
        """With class c, whose probabilities are p; of second and entropy only what the kind of confidence needs."""
        first, second, entropy, label = self
        if kind == "margin":
            second = torch.maximum(second, torch.minimum(first, p))
        if kind == "entropy":
            entropy = entropy + torch.xlogy(p, p)
        if label is not None:
            label = torch.where(p > first, c, label)
        return _Ranking(torch.maximum(first, p), second, entropy, label)

    def confidence(self, kind):
        """Eqs. 5, 11, 12 after the last class. Raises ValueError on another kind."""
        if kind not in ("margin", "max", "entropy"):
            raise ValueError(f"confidence {kind!r} is unknown; expected 'margin', 'max' or 'entropy'")
        return {"margin": self.first - self.second, "max": self.first, "entropy": self.entropy}[kind]


def _both_after(raw, refined, prob, c, plan, kind):
    """The raw and the refined ranking after the classes c, c+1, ... of prob."""
    for i, (p, floor) in enumerate(zip(prob.unbind(1), plan.floors)):
        raw, refined = raw.after(p, c, kind), refined.after(_united(p, floor, plan), c + i, kind)
    return raw, refined


_COMPILED = {}  # by shape of prob


def use_compiler(shape):
    """Compiles `pseudo_labels` of probabilities of one shape (B,C,H,W), at the next call; other shapes stay as they were."""
    # For one shape alone: the compiler gives up on a function after eight, and pictures of odd sizes are not worth the wait.
    _COMPILED[tuple(shape)] = torch.compile(_both_after, dynamic=False)


@torch.no_grad()
def pseudo_labels(prob, alpha, *, kind="margin", valid=None, threshold=None, refinement=True, **options):
    """Eq. 4 with Sec. 3.2.2: the threshold comes from the raw probabilities, the decision from the refined ones.

    label = argmax_c refined_c where confidence(refined) > threshold, else 255

    prob (B,C,H,W), the teacher's; alpha 0..1, see `dpa_alpha`; kind: see `confidence`; valid (B,H,W) bool, False on
    padding; threshold: a fixed one in place of DPA (FixMatch: 0.95), alpha is not used then;
    refinement=False leaves Eqs. 7-10 out; options: those of `refine`. Returns PseudoLabels.
    """
    plan = _plan(prob, **options)
    if not refinement:
        plan = plan._replace(grid=[])
    raw, refined = _Ranking.of_nothing(prob, labels=False), _Ranking.of_nothing(prob, labels=True)
    zero, both_after = torch.zeros((), device=prob.device), _COMPILED.get(prob.shape, _both_after)
    for c in range(0, prob.shape[1], CLASSES_AT_ONCE):
        some = slice(c, c + CLASSES_AT_ONCE)
        raw, refined = both_after(raw, refined, prob[:, some], zero + c, plan._replace(floors=plan.floors[some]), kind)
    if threshold is None:
        threshold = dpa_threshold(raw.confidence(kind), alpha, valid)
    conf = refined.confidence(kind)
    keep = conf > threshold
    if valid is not None:
        keep = keep & valid
    # Paper, Sec. 1: the class whose union beats every other's. Authors' code: the raw argmax. Here: the paper.
    label = refined.label.long().masked_fill(~keep, IGNORE)
    return PseudoLabels(label, keep, conf, threshold if torch.is_tensor(threshold) else conf.new_full((), threshold))
