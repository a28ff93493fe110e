"""Greedy decoding from one prefill, in branches or rows, with or without an intervention."""
