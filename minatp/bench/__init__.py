"""The benchmark. It measures minatp and is no part of it: nothing outside this folder imports it.

__main__         python -m minatp.bench: minatp timed beside the same model as others drive it
cases            what is timed, by whom, and whether all sides compute the same
peer             the other sides: Hugging Face's LlamaForCausalLM under minatp's heads
fake             python -m minatp.bench --fake: what minatp costs on a GPU, counted without one
fake_gpu         the GPU that is only counted, and its model of time
compile_report   every kernel as it is launched, compiled without a GPU
lease            python -m minatp.bench.lease: what ten minutes of a rented GPU should tell first
"""
