"""Self-distillation with multi-crop (DINO, Caron et al. 2021; DINOv2), the student's crops in one packed sequence.

The teacher sees two large crops of each scan, the student these and four small ones. Large and small crops lie end to
end in one sequence, without padding, and each attends to itself alone: one call of each kernel for all of them. In
training the student's blocks leave samples out, and what is left out is not computed. No label is used: what was
learned is that a part of a scan lies beside whole scans of its digit.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from shared import Scans, accuracy, digits, ops_of, started, steps
from torch import Tensor, nn

import vitkernels as vk

LARGE, SMALL, SMALL_CROPS, WIDTH, PROTOTYPES = 16, 8, 4, 64, 64
BATCH = 32


class Model(nn.Module):
    """Crops of several sizes to scores of prototypes, a row for each crop."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = vk.nn.VisionTransformer(
            img_size=LARGE,
            patch_size=4,
            in_chans=1,
            num_classes=0,
            embed_dim=WIDTH,
            depth=2,
            num_heads=4,
            drop_path_rate=0.1,
            drop_path_subset=True,
            mean=(0.3,),
            std=(0.35,),
        )
        started(self.backbone)
        self.head = nn.Sequential(nn.Linear(WIDTH, 128), nn.GELU(), nn.Linear(128, 32))
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, 32))

    def forward(self, crops: list[Tensor]) -> Tensor:
        """[B_i, 1, S_i, S_i] each to [sum of B_i, PROTOTYPES]."""
        points = self.head(self.backbone(crops))
        points = points - points.mean(0)  # what all crops share says nothing
        return F.normalize(points, dim=-1) @ F.normalize(self.prototypes, dim=-1).t()


def assigned(scores: Tensor, temperature: float = 0.05) -> Tensor:
    """What the teacher says of each crop: sure of one prototype, and over the batch of all alike (Sinkhorn-Knopp)."""
    share = (scores / temperature).exp()
    for _ in range(3):
        share = share / share.sum(0)
        share = share / share.sum(1, keepdim=True)
    return share


def crop(scans: Tensor, size: int, smallest: float, largest: float) -> Tensor:
    """A random square of each scan, between these shares of its side, [B, 1, size, size]."""
    side = torch.empty(len(scans)).uniform_(smallest, largest)
    middle = (2 * torch.rand(len(scans), 2) - 1) * (1 - side).unsqueeze(1)  # in [-1, 1], as affine_grid has it
    windows = torch.zeros(len(scans), 2, 3)
    windows[:, 0, 0] = windows[:, 1, 1] = side
    windows[:, :, 2] = middle
    grid = F.affine_grid(windows, [len(scans), 1, size, size], align_corners=False)
    return F.grid_sample(scans / 255, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def named_by_neighbours(model: Model, train: Scans, test: Scans, count: int = 10) -> float:
    """Share of small crops of held-out scans whose nearest whole training scans are mostly of their own digit."""
    model.eval()
    whole = F.interpolate(train.images / 255, LARGE)
    known, asked = (F.normalize(model.backbone(each), dim=-1) for each in (whole, crop(test.images, SMALL, 0.6, 0.8)))
    nearest = train.labels[(asked @ known.t()).topk(count).indices]
    return accuracy(F.one_hot(nearest, 10).sum(1), test.labels)


def main(steps: int = 250) -> None:
    """Train without labels, then ask for neighbours."""
    torch.manual_seed(0)
    train, test = digits()
    student = Model()
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    before = named_by_neighbours(teacher, train, test)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.04)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step, (scans, _) in enumerate(train.batches(BATCH, steps)):
        large = torch.cat([crop(scans, LARGE, 0.7, 1.0) for _ in range(2)])
        small = torch.cat([crop(scans, SMALL, 0.5, 0.8) for _ in range(SMALL_CROPS)])
        with vk.record() as calls:
            target = assigned(teacher([large])).unflatten(0, (2, -1))
            guess = F.log_softmax(student([large, small]) / 0.1, dim=-1).unflatten(0, (2 + SMALL_CROPS, -1))
            losses = -torch.einsum("tbp,sbp->ts", target, guess) / len(scans)
            loss = losses[~torch.eye(2, 2 + SMALL_CROPS, dtype=torch.bool)].mean()  # no crop is held against itself
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.03)
        if step % 50 == 0:
            print(f"step {step:4d}: loss {loss.item():.3f}")
    ran = {call.op for call in calls}
    assert {"patch_embed", "attention_varlen", "add_layer_norm", "mlp"} <= ran, "it did not run fused"
    print(f"ran: {ops_of(calls)}")
    after = named_by_neighbours(teacher, train, test)
    print(f"nearest whole scans name {after:.1%} of the small crops rightly; before training, {before:.1%}")
    assert after > before + 0.1, "parts do not lie nearer to their digit than before"


if __name__ == "__main__":
    main(steps(__doc__, default=250))
