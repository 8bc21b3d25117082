"""From other models to pools of experts and back; within a pool: prune, merge, change k."""
