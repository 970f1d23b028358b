"""The side of the jail that runs in the zygote and in its sessions: standard library only.

The zygote imports this package alone, without the rest of retrain, so modules in it import one
another relatively.
"""
