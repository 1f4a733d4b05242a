SMOLLM = "smollm2-135m-instruct"
ALIAS = "HuggingFaceTB/SmolLM2-135M-Instruct"
ECHO = "echo"
UPSTREAM = "absent/upstream"
REFUSING = "refusing/upstream"
PARIS = "What is the capital of France?"

QUEUE_S = 5.0
"""How long a request waits for a replica in these tests."""
