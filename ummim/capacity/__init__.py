"""Whether a recipe fits a cluster, how long it takes there, and what slow ranks and failures cost: ``ummim capacity``.

Everything here is calculated from counts of what the code does (``ummim.cost``), DeepSpeed's layout of its states, and
published numbers of hardware; docs/scaling.md says how, and what of it was checked.
"""
