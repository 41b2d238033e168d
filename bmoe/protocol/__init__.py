"""The shared contract: every signed byte, and the one MQTT link. Imports nothing else of ours."""
