"""The exchange: the only place where contributions cross ranks.

    config      the `exchange` section of a configuration
    base        what all plans share: folding, the integer ring
    dense       root: Reduce to rank 0, step there, Bcast (the classic server)
                replicated: Allreduce, every rank takes the same step
    sharded     every rank owns 1/n of the coordinates: it sums their pieces, steps, and sends the result to all
    upload, accumulator, download
                the three stages of sharded, in the order in which a piece passes through them
    shared_memory
                the same on one node, read directly from the other ranks' memory
    regions     aggregates inside a node, site or continent first, then across
    overlap     runs any plan but shared_memory and regions behind the next round's training (`overlap: true`)
    fragments   exchanges one part of the vector each round, with any plan but regions (`fragments: 4`)
    progress    the silos' own parameters while global ones arrive late or part by part
    plans       the family of plans, by name
    choose      picks the plan (`auto` follows rules) and builds its exchange
    autotune    measures the plans (`plan: measure`)
    cost        the inputs of a plan's cost; each plan computes its own

A rank folds its silos into one weighted partial sum before it sends anything (`scope: rank`), so the cost depends on
ranks, not on silos. Under `scope: silo` each silo's delta is sent by itself and has its own codec residual.
"""
