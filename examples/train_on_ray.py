"""Train on a Ray cluster: Ray Train starts the workers, and each runs the same `fastvlm train`.

    python examples/train_on_ray.py --workers 2 -- draft --data scenes:64 --output /shared/run

needs `pip install 'fastvlm[ray]'`. Every worker finds the model, the data and the output.
"""

import argparse
import sys
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def work(config: dict[str, Any]) -> None:
    """Run the command in a worker, whose rank and peers Ray Train has set."""
    from fastvlm.cli import run

    code = run(["train", *config["command"]])
    if code:
        raise RuntimeError(f"fastvlm train ended with the exit code {code}.")


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", action="store_true", help="a GPU for each worker")
    parser.add_argument("--address", default="local", help="the cluster, such as auto")
    options = parser.parse_args(sys.argv[1:split])
    ray.init(address=options.address)
    TorchTrainer(
        work,
        train_loop_config={"command": sys.argv[split + 1 :]},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=options.gpus),
        run_config=RunConfig(),
    ).fit()
