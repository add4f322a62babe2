"""What a training run will take before it is started: tokens, steps, memory, time and money, from closed formulas.

Nothing here loads weights or needs torch, except `model_sizes`, which counts parameters on the meta device.
"""
