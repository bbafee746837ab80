"""The folder of a set of samples: whose it is, and what is deleted from it when.

N samples
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from var_exp.evaluation.samples.files import is_whole_png
from var_exp.io.files import atomic_write
from var_exp.io.parts import Parts
from var_exp.io.run_folder import delete_scores, read_figures

NUMBERED = re.compile(r"(\d{6,})\.png")
BATCHES = re.compile(r"(\d{6,})-(\d{6,})\.npz")
BESIDE = re.compile(
    r"\.(\d{6,}|plan|samples|grid|coarse_to_fine|metrics|environment)\.\d+\.(png|npz|json)"
)
REMEDY = "choose another folder (out_dir=...), or move it away"


class SampleFolder:
    """Where samples 0..N - 1 of a plan lie; other files may lie there too.

    Args:
        folder: need not exist yet.
        plan: plain data that decides every sample.
        num_samples: N.
        unfinished: plain data that decides what is kept until the set is finished.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], num_samples: int, unfinished: Any):
        self.folder, self.num_samples = Path(folder), num_samples
        self.plan = json.loads(json.dumps(plan))  # as it will be read
        self.plan_file, self.npz = self.folder / "plan.json", self.folder / "samples.npz"
        self.grid, self.strip = self.folder / "grid.png", self.folder / "coarse_to_fine.png"
        work = {"samples": hashlib.sha256(json.dumps(unfinished).encode()).hexdigest()}
        place = self.folder / "unfinished"
        self.parts = Parts(place, "record.json", work, BATCHES, "out_dir", REMEDY)

    def png(self, sample_id: int) -> Path:
        return self.folder / f"{sample_id:06d}.png"

    def numbered(self) -> dict[int, Path]:
        """The PNG files of samples, by number."""
        matches = {path: NUMBERED.fullmatch(path.name) for path in self.folder.iterdir()}
        return {int(match[1]): path for path, match in matches.items() if match}

    def check(self) -> None:
        """Raise ValueError where there are files that `begin` would take for samples of ours."""
        others = [path for path in (self.npz, self.grid, self.strip) if path.exists()]
        others += self.numbered().values() if self.folder.exists() else []
        if others and not self.plan_file.exists():
            raise ValueError(
                f"out_dir: {str(self.folder)!r} holds {others[0].name}, but no plan.json that says "
                f"it was drawn here, and it would be replaced; {REMEDY}"
            )
        self.parts.read_record()
        read_figures(self.folder / "metrics.json")  # or it would show when samples are drawn

    def begin(self) -> str | None:
        """Make the folder one of this plan, keeping what belongs to it.

        Returns:
            A line for the user where samples of another plan were there, which are deleted.

        Raises:
            ValueError: see `check`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check()
        for path in self.folder.iterdir():
            if BESIDE.fullmatch(path.name):  # of a process that was killed
                path.unlink()
        line, (plan, num_samples) = None, self._recorded()
        if plan != self.plan:
            line = self._replace(plan)
        elif num_samples != self.num_samples:
            self._forget_whole()
        for i, path in self.numbered().items():
            if i >= self.num_samples or not is_whole_png(path):
                path.unlink()
        content = {"plan": self.plan, "num_samples": self.num_samples}
        with atomic_write(self.plan_file) as unfinished:
            unfinished.write_text(json.dumps(content) + "\n")
        return line

    def clear(self) -> None:
        """Delete what was needed until the whole, scores included, was written."""
        self.parts.remove()

    def _recorded(self) -> tuple[dict[str, Any], int]:
        try:
            content = json.loads(self.plan_file.read_text())
            return dict(content["plan"]), content["num_samples"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # missing, or damaged
            return {}, 0

    def _replace(self, earlier: dict[str, Any]) -> str | None:
        numbered = self.numbered()
        had_some = numbered or self.parts.present() or self.npz.exists()
        self._forget_whole()
        self.npz.unlink(missing_ok=True)
        self.clear()
        for path in numbered.values():
            path.unlink()
        differ = [key for key in self.plan if earlier.get(key) != self.plan[key]]
        why = f"with other {', '.join(differ)}" if earlier else "in a way that is not recorded"
        return f"{self.folder}: replacing samples that were drawn {why}" if had_some else None

    def _forget_whole(self) -> None:
        """Delete what speaks of all samples, but for pixels."""
        self.grid.unlink(missing_ok=True)
        self.strip.unlink(missing_ok=True)
        delete_scores(self.folder / "metrics.json")
