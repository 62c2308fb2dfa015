"""Precision as a property of the graph: from the exported fp32 graphs to fp16, bf16 and int8 ones. torch-free.

Inputs and outputs keep their types, and everything from the last layers that make ``scores`` and ``logits`` on
stays float32 in every precision: scores in half precision would tie by the dozen. No precision scales
anything by the batch, so a prediction does not depend on its neighbours or on padding.
"""
