"""`deepspeed --module s2t2_dist.train RECIPE [key=value ...]`: the same program as `s2t2 train`."""

import sys

from s2t2_dist.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
