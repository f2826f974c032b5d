"""The exchange: the one place where contributions cross ranks.

    config      what a configuration says of it
    base        what the plans share: folding, the ring of integers
    dense       root: Reduce to rank 0, step there, Bcast (the classic server)
                replicated: Allreduce, every rank takes the same step
    sharded     every rank owns 1/n of the coordinates: pieces go to their owners, who add, step and send to all
    upload, accumulator, download
                what that one is made of, in the order in which a piece passes through it
    shared_memory
                the same on one node, straight out of the others' memory
    regions     a node, a site, a continent first; then across
    overlap     any of them but shared_memory and regions behind the next round's training (`overlap: true`)
    fragments   any of them but regions on a part of the vector each round (`fragments: 4`)
    progress    where silos stand whom new parameters reach late, or part by part
    plans       the family of them, by name
    choose      which plan (`auto` goes by rule), and the exchange that it makes
    autotune    plans measured (`plan: measure`)
    cost        what a plan's cost depends on; each plan computes its own

A rank folds its silos into one weighted partial sum before anything is sent (`scope: rank`), so the cost depends on
ranks, not on silos. Under `scope: silo` every silo's delta travels by itself, through a codec of its own residual.
"""
