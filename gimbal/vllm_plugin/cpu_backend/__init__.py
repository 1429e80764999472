"""vLLM's missing CPU expert parallelism: DP + EP + EPLB without a GPU.

vLLM's CPU backend runs MoE models, but not with experts spread over ranks. What it lacks, and the
module that supplies it:

====================================================================  =================
gap                                                                   closed in
====================================================================  =================
``ParallelConfig`` refuses ``enable_eplb`` on this platform            `hook`
the communicator has no ``all_gatherv`` and no ``reduce_scatterv``     `communicator`
the expert kernel ignores ``expert_map``                               `experts`
logical experts are not mapped to physical ones, load not counted      `recording`
no device events, streams or device index, which EPLB asks for         `host_torch`
the model runner never creates the EPLB state                          `worker`
a dead or stuck asynchronous EPLB worker goes unnoticed                `migrations`
====================================================================  =================

`hook` is all that is installed outside a worker process, and it acts only on a configuration with
a ``gimbal`` section, the CPU platform and expert parallelism on. It names `worker` as vLLM's
worker class; that class applies `activation` in its own process. Nothing else is patched, so plain
CPU serving, dense models and a server without the section never see any of this.
"""
