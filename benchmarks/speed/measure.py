"""One measurement in a process of its own: `python measure.py JOB`, a job as JSON; prints the result as JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from datetime import UTC, datetime
from typing import Any

from rows import Job


class Stopwatch:
    """Times optimizer steps from outside: no trainer knows of it, and all columns are timed by the same rule.

    The clock starts when the last warm-up step has been taken, and stops with the last step of all: between them lies
    everything that a step needs, from its data to the new weights. A callback would not do: dpmed charges each step
    at once where a callback that is not its own looks on.

    Args:
        model: counts the tokens of its forward passes.
        warmup: steps that do not count.
        n_timed: steps that count.
        cuda: the steps run on a GPU, whose memory is then what counts.
    """

    def __init__(self, model: Any, *, warmup: int, n_timed: int, cuda: bool) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.warmup, self.n_timed, self.cuda = warmup, n_timed, cuda
        self.start_bytes = self._peak()
        self.peak_bytes = 0
        self.marks: list[float] = []
        self.cpu_seconds = 0.0
        self._cpu_start = 0.0
        self._n_steps = 0
        self._inputs: list[Any] = []
        self._hooks: list[Any] = [
            register_optimizer_step_post_hook(self._stepped),
            model.register_forward_pre_hook(self._forward, with_kwargs=True),
        ]

    def _stepped(self, *_: Any) -> None:
        self._n_steps += 1
        if self._n_steps == self.warmup:
            self._inputs.clear()
            self._synchronize()
            self._cpu_start = time.process_time()
        if self._n_steps == self.warmup + self.n_timed:
            self._synchronize()
            self.cpu_seconds = time.process_time() - self._cpu_start
            self.peak_bytes = self._peak()
        if self._n_steps >= self.warmup:
            self.marks.append(time.perf_counter())

    def _forward(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self._n_steps < self.warmup + self.n_timed:
            mask = kwargs["attention_mask"]
            self._inputs.append((mask.shape[0], mask.numel(), mask.sum()))  # read at the end: no wait for a GPU here

    def _synchronize(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def _peak(self) -> int:
        """Peak memory of this process so far: of the GPU, or resident."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def reading(self) -> dict[str, Any]:
        """What was measured. Raises: RuntimeError if the steps taken are not those announced."""
        if self._n_steps != self.warmup + self.n_timed:
            raise RuntimeError(f"{self._n_steps} optimizer steps were taken, {self.warmup + self.n_timed} announced")
        return {
            "n_steps": self.n_timed,
            "seconds": self.marks[-1] - self.marks[0],
            "cpu_seconds": self.cpu_seconds,
            "step_seconds": [round(b - a, 5) for a, b in zip(self.marks, self.marks[1:], strict=False)],
            "passes": len(self._inputs),
            "records": sum(n for n, _, _ in self._inputs),
            "padded_tokens": sum(n for _, n, _ in self._inputs),
            "real_tokens": int(sum(n for _, _, n in self._inputs)),
            "peak_bytes": self.peak_bytes,
            "start_bytes": self.start_bytes,
        }


def measure(job: Job) -> dict[str, Any]:
    """Train a job's steps and return what the stopwatch read; where it cannot run, the reason as `null`."""
    import torch
    from columns import train
    from workloads import NotHere, make_workload

    from dpmed.environment import device
    from dpmed.errors import InputError, PrivacyError

    torch.set_num_threads(job.settings.threads)
    found: dict[str, Any] = {
        "row": job.row.name,
        "column": job.column,
        "repetition": job.repetition,
        "batch": job.batch,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
        "device": device() if job.settings.device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
    }
    watch: Stopwatch | None = None
    try:
        work = make_workload(job)
        found["n_trainable"] = sum(p.numel() for p in work.model.parameters() if p.requires_grad)
        cuda = job.settings.device == "cuda"
        watch = Stopwatch(work.model, warmup=job.settings.warmup, n_timed=job.n_timed, cuda=cuda)
        with tempfile.TemporaryDirectory(prefix="dpmed-speed-") as folder:
            train(work, job, folder)
        return {**found, **_as_planned(watch.reading(), job)}
    except NotHere as reason:
        return {**found, "null": str(reason)}
    except (
        RuntimeError,
        NotImplementedError,
        ValueError,
        AssertionError,
        AttributeError,
        InputError,
        PrivacyError,
    ) as error:
        lines = str(error).splitlines() or [""]
        return {**found, "null": f"{type(error).__name__}: {lines[0][:200]}"}
    finally:
        if watch is not None:
            watch.detach()


def _as_planned(reading: dict[str, Any], job: Job) -> dict[str, Any]:
    """The reading, if each step of a row of fixed length was one pass over the whole physical batch."""
    passes, records = job.n_timed, job.n_timed * job.batch
    if job.row.draw is None and (reading["passes"], reading["records"]) != (passes, records):
        raise RuntimeError(f"{reading['passes']} passes over {reading['records']} records, not {passes} over {records}")
    return reading


def main() -> int:
    job = Job.from_dict(json.loads(sys.argv[1]))
    from dpmed import environment

    environment.prepare(online=False)
    print(json.dumps(measure(job)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
