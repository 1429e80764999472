"""Level `placement` inside vLLM: who asks for which expert, and a map that knows it.

===============  ==========================================================================
module           does
===============  ==========================================================================
`hook`           patches ``EplbState`` where the level is on; nothing else touches vLLM
`member`         a rank's part in every collective, which it plays whatever fails
`controller`     one per worker process: what happens at a step, a rearrangement, a commit
`view`           what it knows of its place, and of each model's last window
`window`         vLLM's load window reduced to one row per rank, with ages and step kinds
`rows`           gathered rows turned into counts per source engine (pure)
`sending`        what this engine's requests send to other engines, measured in between
`compiling`      core's planner compiled once per machine, beside the server's start
`agreement`      every rank proposes the same map or the old one stays
`replicas`       each rank's own replica table, near replicas first
`watch`          notices that vLLM's asynchronous worker is dead or stuck
`rebalance_log`  one record per rearrangement, predicted against realized
`stats`          what ``gimbal stats`` reads, over ``collective_rpc``
`route`          the API server's route that answers it
===============  ==========================================================================

A rearrangement in four steps: gather rows, plan, agree, commit. Collectives are the same on every
rank whatever fails locally, since a rank that skips one hangs the others; a failure becomes a
vote for the old map.
"""
