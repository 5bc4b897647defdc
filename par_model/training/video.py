"""Train a small video tokenizer on raw clips: ``parvis train-video-tokenizer``.

Loss: L1, plus L1 of the differences between neighbours in space and in time (edges and motion), plus L2. FSQ needs no
commitment term, and no code can be out of use for good.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from par_model.config import VideoTokenizerConfig
from par_model.training.clips import ClipFolder
from par_model.training.device import Batches, adamw, autocast, choose_device, load_optimizer, on_cpu
from par_model.training.files import InputError, keep_run_inputs
from par_model.training.run import EMA, Run, batch_index, cosine, write_sheet
from par_model.video import VideoTokenizer

VALIDATED = 128  #: held-out clips of a report


def train(args: argparse.Namespace) -> None:
    """Run or resume the training that ``args`` describes. Raises InputError, OSError."""
    data, held_out = ClipFolder.open(args.data), ClipFolder.open(args.val)
    keep_run_inputs(args.run, data=args.data, val=args.val)
    try:
        config = VideoTokenizerConfig(
            levels=tuple(args.levels),
            widths=tuple(args.widths),
            strides=tuple((time, 2, 2) for time in args.time_strides),
            res_blocks=args.res_blocks,
            last_blocks=args.last_blocks,
            norm_groups=args.norm_groups,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    check_clips(config, data, held_out)
    device = choose_device(args.device)
    with Run(args.run, args.minutes) as run:
        _train(args, config, run, device, data, held_out)


def check_clips(config: VideoTokenizerConfig, *folders: ClipFolder) -> None:
    """Raise InputError where a tokenizer of ``config`` cannot take the clips of a folder."""
    time, side = config.downsampling
    for folder in folders:
        if (folder.frames - 1) % time or folder.size % side:
            raise InputError(
                f"clips of {folder.frames} frames of {folder.size}x{folder.size} pixels; expected one frame more than "
                f"a multiple of {time}, and a multiple of {side} pixels a side"
            )


def _train(
    args: argparse.Namespace,
    config: VideoTokenizerConfig,
    run: Run,
    device: torch.device,
    data: ClipFolder,
    held_out: ClipFolder,
) -> None:
    torch.manual_seed(args.seed)
    model = VideoTokenizer(config).to(device)
    optimizer = adamw(model.parameters(), args.lr, device)
    ema = EMA(model, 0.998)
    step = 0
    about = asdict(config) | {"kind": "video-tokenizer"}
    with run.resume(args.resume, about) as state:
        if state is not None:
            model.load_state_dict(state["live"])
            load_optimizer(optimizer, state["optimizer"])
            ema.load(state["model"])
            step = state["step"]
    batches = Batches(data, device)

    def save() -> None:
        final = {"model": ema.shadow, "config": about}
        live = {"live": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        run.save("checkpoint.pt", on_cpu(final | live))
        if done:
            run.save("model.pt", on_cpu(final))

    done = run.done(step, args.steps)
    while not done and not run.should_stop:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, args.steps, args.lr, warmup=50, share=run.share)
        x = batches.batch(batch_index(args.seed, step, args.batch, len(data)))
        parts = update(model, x, optimizer)
        ema.update(model, step)
        step += 1
        done = run.done(step, args.steps)
        if step % args.report == 0 or done:
            save()  # first: a log or sheet that fails must not lose the steps
            row = {name: float(value) for name, value in parts.items()}
            measured, sheet = validate(config, ema, held_out)
            run.log(step=step, clips=step * args.batch, **row, **measured)
            write_sheet(run.path / "sheet.png", sheet)
    save()


def update(model: VideoTokenizer, x: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """One update of the weights by clips ``x`` [B,3,T,H,W] on the model's device; the parts of its loss stay there."""
    with autocast(x.device):
        loss, parts = reconstruct(model, x)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return {name: value.detach() for name, value in parts.items()}


def reconstruct(model: VideoTokenizer, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and its parts, of clips ``x`` [B,3,T,H,W] in [0,1]."""
    z = model.features(x).float()
    with autocast(x.device, enabled=False):
        codes = model.quantizers.quantise(z)
    y = model.decode_codes(codes).float()
    l1 = (y - x).abs().mean()
    edges = sum((y.diff(dim=axis) - x.diff(dim=axis)).abs().mean() for axis in (3, 4))
    motion = (y.diff(dim=2) - x.diff(dim=2)).abs().mean()
    l2 = ((y - x) ** 2).mean()
    return l1 + edges + motion + 2 * l2, {"l1": l1, "edges": torch.as_tensor(edges), "motion": motion, "mse": l2}


@torch.no_grad()
def validate(config: VideoTokenizerConfig, ema: EMA, held_out: ClipFolder) -> tuple[dict[str, float], np.ndarray]:
    """PSNR (dB) and the share of codes in use on held-out clips, with the averaged weights; and a sheet, uint8 [H,W,3],
    of frames of the first clips, each above its reconstruction.
    """
    device = next(iter(ema.shadow.values())).device
    model = VideoTokenizer(config).to(device).eval()
    model.load_state_dict(ema.shadow)
    squared, used = 0.0, set()
    rows: list[Tensor] = []
    count = min(VALIDATED, len(held_out))
    for start in range(0, count, 16):
        x = held_out.batch(np.arange(start, min(start + 16, count))).to(device)
        with autocast(device):
            z = model.features(x).float()
            ids = model.quantizers.ids(z)
            y = model.decode(ids).float().clamp(0, 1)
        squared += float(((y - x) ** 2).mean(dim=(1, 2, 3, 4)).sum())
        used.update(ids.flatten().tolist())
        if not rows:
            pairs = torch.stack([x[:8, :, ::2], y[:8, :, ::2]], 1)  # [8,2,3,T',H,W]
            rows.append(pairs.permute(0, 1, 4, 3, 5, 2).flatten(3, 4).flatten(0, 2))  # [8*2*H, T'*W, 3]
    measured = {"psnr_db": float(-10 * np.log10(squared / count)), "codes_used": len(used) / config.codebook_size}
    return measured, (torch.cat(rows) * 255).round().to(torch.uint8).cpu().numpy()
