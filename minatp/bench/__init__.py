"""The benchmark. It measures minatp and is no part of it: nothing outside this folder imports it.

__main__   python -m minatp.bench: minatp timed beside the same model as others drive it
cases      what is timed, by whom, and whether all sides compute the same
peer       the other sides: Hugging Face's LlamaForCausalLM under minatp's heads
fake_gpu   python -m minatp.bench.fake_gpu: what a GPU would launch, counted without one
lease      python -m minatp.bench.lease: the most decisive figures in ten minutes of a rented GPU
"""
