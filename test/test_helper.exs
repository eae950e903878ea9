unless Code.ensure_loaded?(:telemetry) do
  Code.require_file("support/telemetry.exs", __DIR__)
  # It looks for telemetry when it starts.
  Logger.configure(level: :warning)
  :ok = Application.stop(:bombus)
  :ok = Application.start(:bombus)
  Logger.configure(level: :debug)
end

ExUnit.start()
