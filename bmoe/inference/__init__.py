"""ONNX sessions in a killable child process; what an agent, a referee and a validator run experts with."""
