"""`bmoe flash`: writes an operating system's image to a card and puts beside it what the first boot needs.

plan (what would be done, from bytes alone) -> disks (which device, and why not that one) -> write -> verify.
"""
