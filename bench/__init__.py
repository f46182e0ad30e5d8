"""`make bench`: what the appliance carries on this machine, each figure beside one it can be compared with."""
