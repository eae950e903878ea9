unless Code.ensure_loaded?(:telemetry) do
  Code.require_file("support/telemetry.exs", __DIR__)
  # It looks for telemetry when it starts.
  Logger.configure(level: :warning)
  :ok = Application.stop(:bombus)
  :ok = Application.start(:bombus)
  Logger.configure(level: :debug)
end

# With Nx on ERL_LIBS the same command runs these too.
excluded =
  if Code.ensure_loaded?(Nx.Serving) do
    {:ok, _started} = Application.ensure_all_started(:nx)
    []
  else
    IO.puts("Nx is not on the path: tests that need it are left out (see README.md)")
    [:nx]
  end

unless File.dir?(Path.expand("../.toolchain/models/smollm2", __DIR__)) do
  IO.puts(
    "No real model in .toolchain/models: its tests are skipped (scripts/real_model.sh fetches it)"
  )
end

unless File.dir?(Path.expand("../.toolchain/tokenizers/templates", __DIR__)) do
  IO.puts(
    "Not all tokenizers in .toolchain/tokenizers: tests are skipped (scripts/published_tokenizers.py fetches them)"
  )
end

ExUnit.start(exclude: excluded)
