"""Kept tables of positions that count what is made. A module of its own, imported by name: ranks need it."""

from rayltx.diffusion_models.lightricks.kept_tables import KeptTables


class CountingTables(KeptTables):
    """made: how many tables were. keeps: False for one that makes all of them anew."""

    def __init__(self, keeps=True):
        super().__init__()
        self.made, self.keeps = 0, keeps

    def tables(self, make, *args, **kwargs):
        def counted(*positions, **how):
            self.made += 1
            return make(*positions, **how)

        if not self.keeps:
            self.forget()
        return super().tables(counted, *args, **kwargs)
