"""What the table's rows mean, for those who read the results."""

NOTES = """\
Extra step time: median step of a tracked copy of the model minus that of an untracked copy; a step is forward, loss,
backward and optimizer. Every batch and every layer is recorded, stats=["lsat"], and no window is published meanwhile.
The copies take turns step by step, and all must end with the same loss to the bit. One sample is the mean of a block
of steps, so that work done only every few steps counts; intervals are bootstrapped over samples. Both trackers record
the same rows of the same layers: of the LSTM and the transformer every step of every sequence. delve would take the
last step of a sequence, or one row as wide as all of its steps; so the layers' outputs are rows already, B·T×D.

delve 0.1.50 replaces its accumulator at each batch: it never adds one batch to another, and publishes the covariance
of the last batch. So it does less than its options promise; it is measured as it is.

Recorder: all that a forward hook does with a layer's output, against one float32 product XᵀX of the same rows,
contiguous, into memory that exists. A convolution's rows are its positions; the bare product gets them gathered.

Published: from add_saturations() until the window's metrics are there, with every scalar that delve computes; "on
disk", until the Parquet file is written as well. delve's add_saturations() computes and writes its CSV files before it
returns, in the training thread; ours works on threads of its own, and is waited for here.
"""
