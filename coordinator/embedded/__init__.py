"""The servers and processes that `bmoe up` runs beside itself on one machine, and the care they need."""
