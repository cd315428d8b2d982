"""The coordinator of the stock app: Flower's FedAvg with its usual settings, and a clock."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    schema = json.loads(Path(str(config["schema"])).read_text())
    random = np.random.default_rng(0)
    arrays = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in schema}
    marks: list[float] = []
    seconds: list[float] = []

    def slowest(replies: list[RecordDict], weighting: str) -> MetricRecord:
        found = [float(reply.metric_records["metrics"]["seconds"]) for reply in replies]
        seconds.append(max(found))
        return MetricRecord({"seconds": max(found)})

    def mark(round_: int, new: ArrayRecord) -> None:
        marks.append(time.monotonic())

    strategy = FedAvg(
        min_train_nodes=3,
        min_evaluate_nodes=3,
        min_available_nodes=3,
        train_metrics_aggr_fn=slowest,
    )
    strategy.start(
        grid,
        ArrayRecord({name: Array(value) for name, value in arrays.items()}),
        num_rounds=int(config["rounds"]),
        evaluate_fn=mark,
    )
    Path(str(config["out"])).write_text(json.dumps({"marks": marks, "seconds": seconds}))
