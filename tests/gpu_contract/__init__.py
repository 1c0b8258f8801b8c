"""What our code asks of a GPU machine's packages, held against the real ones on a machine without a GPU.

`bash tests/run.sh --gpu-contract` runs these tests, in an environment of their own (tools/setup_env.sh).
"""
