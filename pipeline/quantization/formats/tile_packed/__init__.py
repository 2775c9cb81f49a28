"""int4 in the order in which the tensor cores of CUDA cards read it."""
