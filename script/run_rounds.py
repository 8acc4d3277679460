"""Train in rounds, each on negatives mined by the retriever of the round before.

    sh script/run_rounds.sh 3                    three rounds, settings as in torch_src/*_hparams.py
    sh script/run_rounds.sh 3 --denoise          each round's re-ranker removes likely false negatives
    sh script/run_rounds.sh 2 --debug            the sample collection on a CPU
    sh script/run_rounds.sh 3 --dual_train.epoch 4 --mine.negatives 8 --output_dir output/rounds

output/rounds/round{r} holds the retriever of round r, its vectors and result, and in mined/ the training
files of the next round (the last round mines nothing). With --denoise each round also trains a re-ranker on
the negatives that its retriever found, and mines again with its scores. A stage that is up to date is skipped
within seconds, so the same command resumes after a kill. An option goes to every program that has it,
`--STAGE.option` to that program alone; stages: dual_train, dual_infer, mine, cross_train. The table at the
end shows which round is the best. A round needs what `sh script/run_all.sh --plan` names, and takes as long.
"""

import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path: the root is not on it

from metric.evaluation import MEASURES
from script.run_all import PROGRAMS, TOPK, Programs, call, conversion, figures_of, split_options, start
from torch_src import hparams
from torch_src.dual_hparams import DualHparams
from torch_src.inference_de_hparams import InferenceDeHparams
from torch_src.runtime.errors import UserError
from torch_src.runtime.files import from_root, write_json
from torch_src.runtime.log import duration, log
from torch_src.runtime.options import integer
from torch_src.runtime.outputs import TIMES, Output, check_outputs
from torch_src.tools.mining_hparams import MiningHparams

DEFAULT_OUTPUT, ROUNDS = "output/rounds", (1, 1000)
STAGES: Programs = {
    **{name: PROGRAMS[name] for name in ("dual_train", "dual_infer", "cross_train")},
    "mine": MiningHparams,
}
SCRIPTS = {"mine": "script/mine_negatives.py"}


class Rounds:
    """The stages of every round, with the options of each."""

    def __init__(self, count: int, denoise: bool, argv: list[str]):
        self.count, self.denoise = count, denoise
        self.options = split_options(argv, STAGES)
        if "--dual_params" in argv:
            raise UserError(
                "--dual_params: a round searches and mines with the retriever that it trains; pass "
                "--cross_train.dual_params for the start of the re-ranker"
            )
        for name, settings in STAGES.items():  # UserError before the first stage, not hours later
            hp = hparams.parse(settings, self.options[name])
            if getattr(hp, "plan", False):
                raise UserError("--plan: not of rounds; sh script/run_all.sh --plan prints what one takes")
        self.infer = hparams.parse(InferenceDeHparams, self.options["dual_infer"])
        self.dev_set = hparams.parse(DualHparams, self.options["dual_train"]).dev_set_path
        default = from_root(DEFAULT_OUTPUT + ("_debug" if self.infer.debug else ""))
        self.output = Path(self.infer.output_dir if "--output_dir" in argv else default)
        self.seconds: dict[str, float] = {}

    def folder(self, number: int) -> Path:
        return self.output / f"round{number}"

    def stage(self, number: int, name: str, *more: object, label: str = "") -> None:
        """Run one program of one round; the options in `more` win."""
        label = label or name
        log(f"== round {number}: {label}")
        begun = time.monotonic()
        words = [*self.options[name], "--output_dir", str(self.folder(number)), *map(str, more)]
        call([SCRIPTS.get(name, f"do_{name}.py"), *words])
        self.seconds[f"{number} {label}"] = time.monotonic() - begun

    def train_set(self, number: int, kind: str) -> list[str]:
        """Return the option for the training file of a round, which the round before mined."""
        if number == 1:
            return []
        mined = "denoised" if self.denoise else "mined"
        return ["--train_set", str(self.folder(number - 1) / f"{mined}/{kind}.train.tsv")]

    def run(self) -> None:
        """Run all rounds and print the table."""
        topk = self.infer.topk or TOPK
        check_outputs([Output(self.output / "rounds.json", TIMES)], self.infer.inputs)
        for number in range(1, self.count + 1):
            self.stage(number, "dual_train", *self.train_set(number, "dual"))
            self.stage(number, "dual_infer", "--topk", topk)
            call(conversion(self.infer, self.folder(number) / f"res.top{topk}", topk))
            if number < self.count:
                self.mine(number)
        lines = self.table()
        print("\n" + "\n".join(lines), flush=True)
        write_json(self.output / "rounds.json", {"rounds": self.count, "seconds": self.seconds})

    def mine(self, number: int) -> None:
        """Mine the next round's training files, from the data set's own positives in every round."""
        self.stage(number, "mine")
        if not self.denoise:
            return
        mined = self.folder(number) / "mined/cross.train.tsv"
        self.stage(number, "cross_train", "--train_set", mined)
        cross = ["--cross_params", str(self.folder(number) / "cross_params.bin")]
        self.stage(number, "mine", *cross, "--mined_dir", self.folder(number) / "denoised", label="denoise")

    def table(self) -> list[str]:
        """Return the lines of the closing table."""
        lines = [f"{'round':>5} {'time':>8}  " + "  ".join(f"{name:>9}" for name in MEASURES)]
        for number in range(1, self.count + 1):
            took = sum(seconds for name, seconds in self.seconds.items() if name.startswith(f"{number} "))
            figures = figures_of(self.dev_set, self.folder(number) / "dual_res.json")
            lines.append(f"{number:>5} {duration(took):>8}  {figures}".rstrip())
        return lines


def run(argv: list[str]) -> None:
    """Run the number of rounds that the first word gives."""
    if not argv or argv[0].startswith("--"):
        raise UserError("the number of rounds is missing: e.g. sh script/run_rounds.sh 3")
    try:
        count = integer(*ROUNDS)(argv[0])
    except ArgumentTypeError as error:
        raise UserError(f"number of rounds: {error}") from None
    denoise = "--denoise" in argv
    Rounds(count, denoise, [word for word in argv[1:] if word != "--denoise"]).run()


def main(argv: list[str]) -> int:
    """Return the exit status."""
    return start(run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
