"""What the recipes share: a resumable training loop and the pieces of a model card.

Every trained part leaves `NAME.pt` (weights, optimiser, average, step) and `NAME.log` (JSON lines) in the working
folder; running a recipe again goes on from there.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

console = Console()


def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    work: Path,
    device: str,
    decay: float = 0.999,
    bf16: bool = False,
) -> nn.Module:
    """Train `model` for `steps` steps of AdamW and return it with its averaged (EMA) weights.

    The rate is constant and falls linearly to zero over the last quarter, so a run can be prolonged by raising
    `steps` before that quarter begins. The random stream is seeded by the step: a resumed run sees what an
    uninterrupted one sees.
    """
    path = work / f"{name}.pt"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    begin, seconds = 0, 0.0
    if path.exists():
        saved = torch.load(path, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        ema, begin, seconds = saved["ema"], saved["step"], saved["seconds"]
    columns = (TextColumn(f"{name:10s}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
               TextColumn("loss {task.fields[loss]:.4f}"))  # fmt: skip
    started, mean_loss = time.time(), float("nan")

    def save(step: int) -> None:
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema, step=step,
                     seconds=seconds + time.time() - started)  # fmt: skip
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    with Progress(*columns, console=console, disable=begin >= steps) as progress:
        task = progress.add_task(name, total=steps, completed=begin, loss=mean_loss)
        for step in range(begin, steps):
            generator = torch.Generator().manual_seed(step)
            scale = min(1.0, (step + 1) / 200, (steps - step) / (0.25 * steps))
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = loss_of(generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            keep = min(decay, (step + 1) / (step + 10))
            with torch.no_grad():
                for key, value in model.state_dict().items():
                    if value.is_floating_point():
                        ema[key].lerp_(value, 1 - keep)
                    else:
                        ema[key].copy_(value)
            mean_loss = loss.item() if step == begin else 0.98 * mean_loss + 0.02 * loss.item()
            progress.update(task, advance=1, loss=mean_loss)
            if (step + 1) % 200 == 0 or step + 1 == steps:
                save(step + 1)
                with (work / f"{name}.log").open("a") as log:
                    log.write(
                        json.dumps(
                            dict(
                                step=step + 1, loss=round(mean_loss, 5), seconds=round(time.time() - started + seconds)
                            )
                        )
                        + "\n"
                    )
    model.load_state_dict(ema)
    return model.eval()


def pick(count: int, batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, count, (batch,), generator=generator)


def half(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with floating tensors in float16, contiguous: what the bundled folders hold."""
    return {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}


def commit() -> str:
    """The short hash of the commit a recipe runs from, "unknown" outside a repository."""
    ask = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def training_table(work: Path, *names: str) -> tuple[dict[str, Any], str]:
    """The last log line of each part, as data and as Markdown table."""
    logs = {n: json.loads((work / f"{n}.log").read_text().splitlines()[-1]) for n in names}
    rows = "\n".join(f"| {n} | {v['step']} | {v['seconds'] / 60:.0f} | {v['loss']:.4f} |" for n, v in logs.items())
    return logs, "| part | steps | minutes | last loss |\n| --- | --- | --- | --- |\n" + rows
