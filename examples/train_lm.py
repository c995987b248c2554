"""Train a language model in FP8 beside the same model in BF16, and compare.

    python examples/train_lm.py            # dense: RMSNorm, rotary attention, SwiGLU
    python examples/train_lm.py --moe      # the feed-forward layer is a mixture of experts, top 2
    JAX_NUM_CPU_DEVICES=8 python examples/train_lm.py --mesh data=4,model=2 [--fsdp]
    JAX_NUM_CPU_DEVICES=8 python examples/train_lm.py --mesh expert=8 --experts 8

The text is the Python source of the running interpreter's standard library, or what is below --text
DIR, read byte by byte. Both
models start from the same parameters and see the same batches. Only the products of the layers
differ: jnp.dot and jax.lax.ragged_dot on bfloat16, or jaxfp8.linear, jaxfp8.mlp and
jaxfp8.moe, which quantize an activation where they compute it. As in DeepSeek-V3 (arXiv
2412.19437, 3.3), embedding, head, router, norms and the products inside attention keep a high
precision, and the master weights are float32.

Here is the loop. In the order to read them: `_lm_products.py` has the products, `_lm_model.py` the
model, `_lm_training.py` a training step and the job, `_lm_parallel.py` the meshes, `_lm_data.py` the
text, `_lm_report.py` what is shown and written, `_lm_checkpoint.py` saving and resuming,
`_lm_arguments.py` the command line.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import _lm_report as report
import jax
from _lm_arguments import parse_arguments
from _lm_data import InputError
from _lm_parallel import ONE_DEVICE, Parallel
from _lm_training import Job, Settings

STRIDE = 5  # steps that one model takes before the other has its turn


def train(
    settings: Settings,
    out: pathlib.Path,
    checkpoint: pathlib.Path | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    parallel: Parallel = ONE_DEVICE,
    text: pathlib.Path | None = None,
) -> dict[str, Any] | None:
    """Trains both models, writes the results into `out`, and returns the summary.

    None if it stopped before the last step.
    """
    out.mkdir(parents=True, exist_ok=True)
    console = report.console
    console.quiet = jax.process_index() != 0  # one process reports for all
    job = Job(settings, parallel, text)
    console.print(str(job))
    if checkpoint is not None:
        job.keep_in(checkpoint, resume)
    job.compile()

    stop = settings.steps if stop_after is None else min(stop_after, settings.steps)
    evaluation_steps = settings.evaluation_steps
    with report.progress_bar() as bar:
        task = bar.add_task("", total=settings.steps, completed=job.step)
        while job.step < stop:
            job.train(
                min(job.step + STRIDE, stop, next(s for s in evaluation_steps if s > job.step))
            )
            shown = report.progress_text(job.histories)
            bar.update(task, completed=job.step, description=shown)
            if job.step in evaluation_steps:
                job.evaluate()
    job.close()
    if job.step < settings.steps:
        console.print(f"stopped after step {job.step} of {settings.steps}; --resume continues")
        return None

    summary = job.summary()
    sample = report.sample_text(job.sample())
    if jax.process_index() == 0:
        report.write(out, evaluation_steps, job.histories, summary, sample)
    console.print(report.product_table(job.products))
    console.print(report.comparison_table(summary))
    console.print("text by the FP8 model:\n", sample, sep="\n", markup=False)
    console.print(f"loss.png, curves.json, summary.json and sample.txt are in {out}")
    return summary


HEARTBEAT_SECONDS = 20


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the other processes, if there are any.

    When one of them dies, the others end with an error after two heartbeats at the latest.
    """
    if coordinator is not None:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            num_processes=processes,
            process_id=process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )


def main(argv: list[str] | None = None) -> None:
    settings, rest = parse_arguments(argv)
    join(*(rest.pop(name) for name in ("coordinator", "processes", "process")))
    try:
        train(settings, **rest)
    except (InputError, FloatingPointError) as error:
        sys.exit(f"train_lm: {error}")


if __name__ == "__main__":
    main()
