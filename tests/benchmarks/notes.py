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

add_saturations(): how long the training thread is held when a window closes, in each of two ranks, which are actors on
a local Ray with a core each; the store is an actor as well. The other side holds the same moments in float64, reduces
them by a blocking all_reduce per state (gloo) and decomposes them where it is, as a torchmetrics metric computes; both
sides have to agree on trace and saturation. Neither waits for a rank that is late, nor for what the other left.

Bytes per window: all buffers and serialised headers that a worker sends for a window, against the packed triangle of
each layer in the buffers' precision, once per flush: a live one, and the one that closes the window.

Published: from add_saturations() until the window's metrics are there, with every scalar that delve computes; "on
disk", until the Parquet file is written as well. delve's add_saturations() computes and writes its CSV files before it
returns, in the training thread; ours works on threads of its own, and is waited for here.

max_overhead: blocks of steps that are tracked with this share of the time to spend, in turn with untracked ones; four
blocks are a window, and the tracker has had some to find its rate. What the store does at the end of a window is
waited for, and not timed.

Steps beside the sender: training steps while the threads of the worker pack and send the window before, against steps
with nothing to send; both are tracked, the first batch of a window, which makes new accumulators, included. What is
sent is dropped where it arrives, as a store elsewhere takes no time here.

Lines that are missed, and the floor under each, on the machine below. What its parts take alone, `python -m
tests.benchmarks.products` shows, and within a training, `make profile`.

Extra step time, LSTM and ResNet. Of 1024 rows of 256 features the product takes 0.29 ms and turning the rows into the
layout that its kernel wants 0.11 ms, alone: 0.8 ms a step for the two LSTM layers, 0.21 of delve's extra time. Within a
training the same calls take 1.5 to 2.3 times as long: the rows have just been written by the other core, and the
weights and activations of the step have taken the caches. That leaves 0.31 to 0.47 before any hook, copy or sum. Maps
of 32 channels, as in ResNet-18 of width 32, are bound by memory: a pass over 32,768 positions of them takes as long as
their product, and there are three: to centre, to multiply, and to look at the sums of squares. One kernel that does
them in one pass would halve that; torch has none, and one of our own would have to be compiled where it is installed.

Recorder, 128×256, 2560×256 and maps of 64 channels: within 0.05 of the target when the machine is quiet, beyond it when
it is not. Product and turning are 0.61 of the bare product at 256 features; hook, copy, centring and the second sum of
squares share the rest.

Intake, 34 MB. An actor that takes nothing moves 6 to 7 GB/s, as fast as memory is copied here. The store has to read
each array once to check and add it, which it does at 8 GB/s; one after the other these make 0.53. Several threads that
add were no faster on these two cores, one of which brings the arrays in.
"""
