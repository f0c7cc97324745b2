"""Random cases for as long as one likes: of operators (random_ops.py) or of fits (random_fits.py).

python tests/fuzz.py ops --minutes 5 --seed 7
"""

import argparse
import random
import time

import torch

import mlpext
import random_fits
import random_ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("fits", "ops"))
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    cases = {"fits": random_fits, "ops": random_ops}[arguments.what]
    print(f"{arguments.what}, seed {arguments.seed}, {mlpext._C.cpu_isa()}", flush=True)
    torch.set_num_threads(1)
    r, tally = random.Random(arguments.seed), cases.Tally()
    started = time.monotonic()
    while time.monotonic() < started + 60 * arguments.minutes:
        case = cases.draw(r)
        try:
            tally.add(case, cases.check(case))
        except Exception:
            print(f"\n{case!r}\n", flush=True)
            raise
    count = tally.counts.total()
    print(f"{count} cases, {60 * count / (time.monotonic() - started):.0f} a minute:\n{tally}")


if __name__ == "__main__":
    main()
