"""Write golden.json from the short quickstart: `bash launch/quickstart.sh --short`, then this.

    python -m tests.jobs.make_golden

Only where a change of the mathematics is meant; the commit says which.
"""

import json

from tests.jobs.test_quickstart import GOLDEN, SHORT, steps_of

KEYS = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_bits_per_byte", "entropy")


def main() -> None:
    stages = {
        stage: [{key: line[key] for key in KEYS if key in line} for line in lines]
        for stage, lines in steps_of(SHORT / "quickstart").items()
    }
    GOLDEN.write_text(json.dumps(stages, indent=1) + "\n")


if __name__ == "__main__":
    main()
