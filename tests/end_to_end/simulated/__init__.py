SIMULATED = "simulated"
STREAMS = 512
