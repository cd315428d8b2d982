"""A site of the stock app: it adds a constant to every array, without torch, and says how long."""

import time

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content.array_records["arrays"]
    started = time.monotonic()
    changed = {name: array.numpy() + 1e-4 for name, array in arrays.items()}
    metrics = MetricRecord({"seconds": time.monotonic() - started, "num-examples": 10})
    new = ArrayRecord({name: Array(value.astype("float32")) for name, value in changed.items()})
    return Message(RecordDict({"arrays": new, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"seconds": 0.0, "num-examples": 10})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
