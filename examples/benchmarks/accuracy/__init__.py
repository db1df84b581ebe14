"""The parts of `compare.py` and `report.py`: accuracy of methods on tasks, over seeds.

`tasks` and `images` hold the data, `drawing` makes some of it, `methods` and `ablations` list what is compared,
`backbones` loads what is adapted, `recipes` says how to train and what to search, `training` trains one model once,
`trials` makes that a record, `protocol` decides what to train, `records` keeps the results, `tables` and `plots` show
them.
"""
